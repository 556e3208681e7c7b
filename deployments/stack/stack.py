"""A local stack: Prefect server with UI (SQLite), deployments, a warm runner. Importing this module imports no Prefect.

Prefect reads its settings from the environment when it is imported, so `Stack.enter` comes before any such import.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from weightline.deployments.stack.registry import SUPERVISOR, StackFacts, StackProcess, read_facts, write_facts
from weightline.errors import InputError, LaunchError
from weightline.fleet.local_replica import REPLICAS_DIR_VARIABLE
from weightline.launch.machines import RUNS_DIR_VARIABLE
from weightline.launch.processes import start_process

DASHBOARD_PORT = 4300
_HOST = "127.0.0.1"
_SERVER_START_SECONDS = 120.0
_MAX_RESTARTS = 5
_RESTARTS_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class StackFolder:
    """Where a stack keeps its things: `<runs>/.stack`. Prefect's database stays there, and shows earlier runs too."""

    root: Path

    @classmethod
    def under(cls, runs_dir: Path) -> StackFolder:
        return cls(runs_dir / ".stack")

    @property
    def facts_path(self) -> Path:
        return self.root / "processes.json"

    @property
    def log_dir(self) -> Path:
        return self.root / "logs"

    @property
    def prefect_home(self) -> Path:
        return self.root / "prefect"

    @property
    def replicas_dir(self) -> Path:
        return self.root / "replicas"


def stack_environment(folder: StackFolder, port: int, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what all processes of a stack share. Nothing of it leaves the machine. Pure."""
    no_proxy = ",".join(part for part in (base.get("NO_PROXY", base.get("no_proxy", "")), _HOST, "localhost") if part)
    return {
        **base,
        "PREFECT_HOME": str(folder.prefect_home),
        "PREFECT_API_URL": f"http://{_HOST}:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        # Both rewrite flow runs every five seconds, and SQLite lets one writer at a time: measured as the cause of most
        # "database is locked", and of events that were acted on 20 s late. A run that waits is no news here.
        "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
        # Steps of ranks come a dozen at once: one transaction for them, not one each.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        # The next few runs of a schedule are enough to see.
        "PREFECT_SERVER_SERVICES_SCHEDULER_MIN_SCHEDULED_TIME": "PT5M",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        # Runs say that they live: see the automation for zombies (deployments/server/deploy.py).
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "60",
        # 2 + 4 + ... + 64 s: a flow outlives two minutes without its server.
        "PREFECT_CLIENT_MAX_RETRIES": "6",
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "WEIGHTLINE_LOG_DIR": str(folder.log_dir),
        REPLICAS_DIR_VARIABLE: str(folder.replicas_dir),
        RUNS_DIR_VARIABLE: str(folder.root.parent),
        "PYTHONUNBUFFERED": "1",
    }


def free_port(preferred: int) -> int:
    """The preferred port of the loopback interface if it is free, else one that is."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((_HOST, port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise InputError(f"no port of {_HOST} is free", field="port")


@dataclass(slots=True)
class Stack:
    """The stack of a folder. `start`, then `keep_up` now and then, then `end`. Not shared between processes."""

    folder: StackFolder
    port: int
    is_supervised: bool = False
    """Whether this process is the one that keeps the stack up when whoever asked for it has gone."""
    _env: dict[str, str] = field(init=False)
    _started: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    _restarted_at: list[float] = field(init=False, default_factory=list)
    _dashboard_port: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._env = stack_environment(self.folder, self.port, os.environ)

    @property
    def api_url(self) -> str:
        return self._env["PREFECT_API_URL"]

    @property
    def ui_url(self) -> str:
        return self.api_url.removesuffix("/api")

    @property
    def dashboard_url(self) -> str | None:
        return None if self._dashboard_port is None else f"http://{_HOST}:{self._dashboard_port}"

    def enter(self) -> None:
        """Make this process one of the stack's. Before Prefect is imported."""
        os.environ.update(self._env)

    def start_server(self) -> None:
        """Start the Prefect server and wait until it is healthy. LaunchError with its last lines when it does not come.

        A second start on the same folder finds the database of the first and takes half the time.
        """
        for path in (self.folder.log_dir, self.folder.prefect_home, self.folder.replicas_dir):
            path.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", _HOST, "--port", str(self.port)]
        self._start("server", argv)
        self._wait_until_healthy()

    def start_runner(self) -> None:
        """Start the warm runner. It waits for the work pool by itself."""
        self._start("runner", [sys.executable, "-m", "weightline.deployments.worker.warm_runner"])

    def start_dashboard(self) -> None:
        """Start the dashboard of all runs. It takes up new chains by itself."""
        if self._dashboard_port is None:
            self._dashboard_port = free_port(DASHBOARD_PORT)
        runs_dir, port = f"{self.folder.root.parent}/", str(self._dashboard_port)
        argv = [sys.executable, "-m", "weightline", "dashboard", runs_dir, "--port", port]
        self._start("dashboard", [*argv, "--prefect-ui", self.ui_url])

    def keep_up(self) -> list[str]:
        """Start again what has died; its name. LaunchError when that has happened too often in a short time."""
        dead = [name for name, process in self._started.items() if process.poll() is not None]
        for name in dead:
            now = time.monotonic()
            self._restarted_at = [at for at in self._restarted_at if now - at < _RESTARTS_SECONDS] + [now]
            if len(self._restarted_at) > _MAX_RESTARTS:
                raise LaunchError(f"the {name} died again and again: see {self._log_path(name)}", name=name)
            starts = {"server": self.start_server, "runner": self.start_runner, "dashboard": self.start_dashboard}
            starts[name]()
        return dead

    def end(self) -> None:
        """End everything that was started: the runner first, so that it can still report. Safe to repeat."""
        facts = read_facts(self.folder.facts_path)
        if facts is not None:
            facts.end()
        for process in self._started.values():
            process.wait()
        self._started.clear()
        self.folder.facts_path.unlink(missing_ok=True)

    def _start(self, name: str, argv: list[str]) -> None:
        with self._log_path(name).open("ab") as log:
            self._started[name] = start_process(argv, env=self._env, stdout=log, stderr=subprocess.STDOUT)
        processes = [StackProcess.of(n, p.pid) for n, p in self._started.items() if p.poll() is None]
        if self.is_supervised:
            processes.append(StackProcess.of(SUPERVISOR, os.getpid()))
        write_facts(self.folder.facts_path, StackFacts(self.api_url, self.ui_url, tuple(processes), self.dashboard_url))

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + _SERVER_START_SECONDS
        while time.monotonic() < deadline:
            returncode = self._started["server"].poll()
            if returncode is not None:
                tail = self._log_path("server").read_text(errors="replace").splitlines()[-15:]
                told = "\n    ".join([f"the Prefect server ended with exit code {returncode}. Its last lines:", *tail])
                raise LaunchError(told, returncode=returncode, tail=tail)
            if is_healthy(self.api_url):
                return
            time.sleep(0.2)
        raise LaunchError(f"the Prefect server did not come up: see {self._log_path('server')}", name="server")

    def _log_path(self, name: str) -> Path:
        return self.folder.log_dir / f"{name}.log"


def is_healthy(api_url: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        return httpx.get(f"{api_url}/health", timeout=2.0, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def require_answer(api_url: str) -> None:
    """InputError at once when no server answers at the URL, whatever it says: Prefect's client would ask for long."""
    try:
        httpx.get(f"{api_url}/health", timeout=10.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"PREFECT_API_URL: no Prefect server answers at {api_url} ({error}): start one, or unset the variable to "
            "use the stack that is up (weightline up)",
            field="PREFECT_API_URL",
        ) from error


def port_of(facts: StackFacts) -> int:
    """Where a stack's server listens."""
    return int(facts.api_url.rsplit(":", 1)[1].split("/")[0])


def running_stack(folder: StackFolder) -> StackFacts | None:
    """The stack that somebody else keeps up in this folder, if it is whole and answers."""
    facts = read_facts(folder.facts_path)
    return facts if facts is not None and facts.is_up and is_healthy(facts.api_url) else None
