"""Describes a local stack: the paths in its folder, the environment of its processes, and which of them are running.

Importing this imports no Prefect, which reads its settings from the environment at import.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import certifi
import httpx
import psutil

from weightline.deployments.stack import Engine
from weightline.files import write_atomically
from weightline.fleet.local_replica import REPLICA_PYTHON_VARIABLE, REPLICAS_DIR_VARIABLE
from weightline.launch.machines import RUNS_DIR_VARIABLE
from weightline.launch.processes import ProcessId

HOST = "127.0.0.1"
DATABASE, SERVER, WORKER, DASHBOARD, SUPERVISOR = "database", "server", "worker", "dashboard", "supervisor"
_END_OF_CERTIFICATE = "-----END CERTIFICATE-----"
_SUPERVISOR_SECONDS = 40.0
_DATABASE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StackFolder:
    """The folder `<runs>/.stack`. It keeps Prefect's database, so that a later stack shows earlier runs."""

    root: Path

    @classmethod
    def under(cls, runs_dir: Path) -> StackFolder:
        return cls(runs_dir / ".stack")

    @property
    def record_path(self) -> Path:
        return self.root / "processes.json"

    @property
    def log_dir(self) -> Path:
        return self.root / "logs"

    @property
    def prefect_home(self) -> Path:
        return self.root / "prefect"

    @property
    def authorities_path(self) -> Path:
        return self.root / "authorities.pem"

    @property
    def replicas_dir(self) -> Path:
        return self.root / "replicas"

    def log_path(self, name: str) -> Path:
        """Returns the path of the log of the process of that name."""
        return self.log_dir / f"{name}.log"

    def last_lines(self, name: str) -> list[str]:
        """Returns the last 15 lines of the log of the process of that name."""
        return self.log_path(name).read_text(errors="replace").splitlines()[-15:]

    def make(self) -> None:
        """Creates the folders and the certificate file that the processes need. Safe to repeat."""
        for path in (self.log_dir, self.prefect_home, self.replicas_dir):
            path.mkdir(parents=True, exist_ok=True)
        first_authority, end, _ = certifi.contents().partition(_END_OF_CERTIFICATE)
        write_atomically(self.authorities_path, f"{first_authority}{end}\n")


def stack_environment(
    folder: StackFolder, port: int, base: Mapping[str, str], vllm_python: Path | None = None
) -> dict[str, str]:
    """Returns `base` with the variables of all processes of a stack. They turn telemetry off. Pure."""
    no_proxy = ",".join(part for part in (base.get("NO_PROXY", base.get("no_proxy", "")), HOST, "localhost") if part)
    return {
        **base,
        "PREFECT_HOME": str(folder.prefect_home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        # The API uses plain HTTP. Every client of Prefect loads authorities' certificates all the same, and a run has
        # several clients. Loading all of certifi's certificates takes 40 ms of CPU, loading a single one 3 ms.
        "PREFECT_API_SSL_CERT_FILE": str(folder.authorities_path),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # Both services rewrite flow runs every five seconds. On SQLite, where one connection writes at a time, they
        # caused most errors "database is locked" and delayed events by 20 s. No part of weightline depends on them.
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
        # Steps of ranks arrive a dozen at a time. One transaction writes them all, instead of one each.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        # The UI needs to show only the next few runs of a schedule.
        "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT5M",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": "0.2",
        "PREFECT_WORKER_PREFETCH_SECONDS": "0",
        # Seconds between two heartbeats of a run: see deployments/server/automations.py.
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
        # Each would cost a request of every new client, and a run has several clients. Client and server are the same
        # installation, and CSRF tokens protect only browsers.
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
        # 2 + 4 + ... + 64 s: a flow survives two minutes without its server.
        "PREFECT_CLIENT_MAX_RETRIES": "6",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "WEIGHTLINE_LOG_DIR": str(folder.log_dir),
        REPLICAS_DIR_VARIABLE: str(folder.replicas_dir),
        REPLICA_PYTHON_VARIABLE: "" if vllm_python is None else str(vllm_python),
        RUNS_DIR_VARIABLE: str(folder.root.parent),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True, slots=True)
class StackRecord:
    """The record of a stack's processes and URLs, by which `down` ends exactly these processes."""

    api_url: str
    ui_url: str
    dashboard_url: str | None = None
    processes: dict[str, ProcessId] = field(default_factory=dict)
    """By name, in the order of their start."""
    vllm_python: str | None = None
    """The Python by which vLLM serves; None for the embedded server."""

    @property
    def engine(self) -> Engine:
        """What serves."""
        return Engine.EMBEDDED if self.vllm_python is None else Engine.VLLM

    @property
    def port(self) -> int:
        """The port of the Prefect server."""
        return int(self.api_url.rsplit(":", 1)[1].split("/")[0])

    @property
    def is_whole(self) -> bool:
        """True if every process is running."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes.values())

    def end(self) -> None:
        """Ends all running processes except the caller; first the supervisor, which restarts others. Safe to repeat."""
        others = {name: process for name, process in self.processes.items() if process.pid != os.getpid()}
        if SUPERVISOR in others:
            ask_to_end(others[SUPERVISOR], signal.SIGTERM, _SUPERVISOR_SECONDS)
        for name, process in reversed(others.items()):
            if name == DATABASE:
                ask_to_end(process, signal.SIGINT, _DATABASE_SECONDS)
            process.end()

    def save(self, path: Path) -> None:
        """Writes the file in one rename."""
        write_atomically(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Returns the record in the file, or None if it is missing or cannot be read."""
        try:
            fields = json.loads(path.read_text())
            processes = {name: ProcessId(**process) for name, process in fields.pop("processes").items()}
            return cls(**fields, processes=processes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def running_stack(folder: StackFolder) -> StackRecord | None:
    """Returns the stack in this folder if all its processes are running and its server answers, else None."""
    found = StackRecord.load(folder.record_path)
    return found if found is not None and found.is_whole and is_healthy(found.api_url) else None


def is_healthy(api_url: str) -> bool:
    """Returns whether a Prefect server answers at the URL."""
    try:
        return httpx.get(f"{api_url}/health", timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def ask_to_end(process: ProcessId, signal_number: signal.Signals, wait_seconds: float) -> None:
    """Sends a signal to the process, but not to its descendants, and waits until it ends."""
    found = process.find()
    if found is not None:
        with contextlib.suppress(psutil.Error):
            found.send_signal(signal_number)
            found.wait(wait_seconds)
