"""A local stack as its folder shows it: where things lie, what its processes share, and which of them run.

Importing this imports no Prefect, which reads its settings from the environment as it is imported.
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

from weightline.files import write_atomically
from weightline.fleet.local_replica import REPLICAS_DIR_VARIABLE
from weightline.launch.machines import RUNS_DIR_VARIABLE
from weightline.launch.processes import ProcessId

HOST = "127.0.0.1"
DATABASE, SERVER, WORKER, DASHBOARD, SUPERVISOR = "database", "server", "worker", "dashboard", "supervisor"
_END_OF_CERTIFICATE = "-----END CERTIFICATE-----"
_SUPERVISOR_SECONDS = 40.0
_DATABASE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StackFolder:
    """`<runs>/.stack`. Prefect's database stays there, so that a later stack shows earlier runs."""

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
        """Where the process of that name writes."""
        return self.log_dir / f"{name}.log"

    def last_lines(self, name: str) -> list[str]:
        """The end of what the process of that name wrote."""
        return self.log_path(name).read_text(errors="replace").splitlines()[-15:]

    def make(self) -> None:
        """Creates what processes expect to be there. Safe to repeat."""
        for path in (self.log_dir, self.prefect_home, self.replicas_dir):
            path.mkdir(parents=True, exist_ok=True)
        first_authority, end, _ = certifi.contents().partition(_END_OF_CERTIFICATE)
        write_atomically(self.authorities_path, f"{first_authority}{end}\n")


def stack_environment(folder: StackFolder, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """Returns `base` with what all processes of a stack share. Nothing in it leaves the machine. Pure."""
    no_proxy = ",".join(part for part in (base.get("NO_PROXY", base.get("no_proxy", "")), HOST, "localhost") if part)
    return {
        **base,
        "PREFECT_HOME": str(folder.prefect_home),
        "PREFECT_API_URL": f"http://{HOST}:{port}/api",
        # The API speaks plain HTTP. Still, every client of Prefect loads the certificates of its authorities, several
        # clients a run: 40 ms of CPU each for all of certifi's, 3 ms for a single one.
        "PREFECT_API_SSL_CERT_FILE": str(folder.authorities_path),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # Both rewrite flow runs every five seconds. On SQLite, where one connection writes at a time, they caused most
        # of "database is locked", and events that were acted on 20 s late. Nothing here depends on either.
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
        # Steps of ranks come a dozen at once: one transaction for them, not one each.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        # The next few runs of a schedule are enough to see.
        "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT5M",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": "0.2",
        "PREFECT_WORKER_PREFETCH_SECONDS": "0",
        # How often runs send a heartbeat: see the automation for zombies (deployments/server/automations.py).
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
        # Two requests of every new client, several clients a run: client and server are of one installation, and a
        # token against forgery protects browsers.
        "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
        "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",
        # 2 + 4 + ... + 64 s: a flow outlives two minutes without its server.
        "PREFECT_CLIENT_MAX_RETRIES": "6",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "WEIGHTLINE_LOG_DIR": str(folder.log_dir),
        REPLICAS_DIR_VARIABLE: str(folder.replicas_dir),
        RUNS_DIR_VARIABLE: str(folder.root.parent),
        "PYTHONUNBUFFERED": "1",
    }


@dataclass(frozen=True, slots=True)
class StackRecord:
    """What is written down about a stack, so that `down` ends exactly its processes."""

    api_url: str
    ui_url: str
    dashboard_url: str | None = None
    processes: dict[str, ProcessId] = field(default_factory=dict)
    """By name, in the order of their start."""

    @property
    def port(self) -> int:
        """Where the Prefect server listens."""
        return int(self.api_url.rsplit(":", 1)[1].split("/")[0])

    @property
    def is_whole(self) -> bool:
        """Whether every process still runs."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes.values())

    def end(self) -> None:
        """Ends what still runs, except the caller: the supervisor first, which starts others again. Safe to repeat."""
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
        """Returns what the file says, or None when there is none or none that can be read."""
        try:
            fields = json.loads(path.read_text())
            processes = {name: ProcessId(**process) for name, process in fields.pop("processes").items()}
            return cls(**fields, processes=processes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


def running_stack(folder: StackFolder) -> StackRecord | None:
    """Returns the stack that another process keeps up in this folder, if it is whole and its server answers."""
    found = StackRecord.load(folder.record_path)
    return found if found is not None and found.is_whole and is_healthy(found.api_url) else None


def is_healthy(api_url: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        return httpx.get(f"{api_url}/health", timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def ask_to_end(process: ProcessId, signal_number: signal.Signals, wait_seconds: float) -> None:
    """Signals that process alone, not what descends from it, and waits for its end."""
    found = process.find()
    if found is not None:
        with contextlib.suppress(psutil.Error):
            found.send_signal(signal_number)
            found.wait(wait_seconds)
