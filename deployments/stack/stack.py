"""Starts and ends a local stack: database, Prefect server, worker, dashboard. Importing this imports no Prefect."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightline.deployments.stack.database import CONNECTION_VARIABLE, Postgres, find_postgres
from weightline.deployments.stack.folder import (
    DASHBOARD,
    DATABASE,
    HOST,
    SERVER,
    SUPERVISOR,
    WORKER,
    StackFolder,
    StackRecord,
    is_healthy,
    stack_environment,
)
from weightline.deployments.worker import WORK_POOL, WORKER_TYPE
from weightline.errors import InputError, LaunchError
from weightline.fleet.local_replica import end_replicas
from weightline.launch.processes import ProcessId, start_process

DASHBOARD_PORT = 4300
_SERVER_START_SECONDS = 120.0
_MAX_RESTARTS = 5
_RESTARTS_SECONDS = 600.0


@dataclass(slots=True)
class Stack:
    """Starts, restarts and ends the processes of a folder's stack. An instance belongs to one process.

    Call the `start_...` methods, then `keep_up` at intervals, then `end`.
    """

    folder: StackFolder
    port: int
    is_supervised: bool = False
    """True in the supervisor, which keeps the stack running after `weightline up` has returned."""
    vllm_python: Path | None = None
    """The Python by which vLLM serves; None for the embedded server."""
    sqlite_reason: str | None = field(init=False, default=None)
    """The reason why the started server uses SQLite, or None."""
    _postgres: Postgres | None = field(init=False, default=None)
    _env: dict[str, str] = field(init=False)
    _started: dict[str, subprocess.Popen[bytes]] = field(init=False, default_factory=dict)
    _restarted_at: list[float] = field(init=False, default_factory=list)
    _dashboard_port: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._env = stack_environment(self.folder, self.port, os.environ, self.vllm_python)

    @property
    def api_url(self) -> str:
        return self._env["PREFECT_API_URL"]

    @property
    def ui_url(self) -> str:
        return self.api_url.removesuffix("/api")

    @property
    def dashboard_url(self) -> str | None:
        return None if self._dashboard_port is None else f"http://{HOST}:{self._dashboard_port}"

    def enter(self) -> None:
        """Sets the stack's environment in this process. Call it before Prefect is imported."""
        os.environ.update(self._env)

    def start_server(self) -> None:
        """Starts the database and then the Prefect server, and waits until the server is healthy.

        LaunchError with the server's last lines if it does not become healthy. A later start in the same folder finds
        the database and takes half the time.
        """
        self.folder.make()
        self.start_database()
        database = {} if self._postgres is None else {CONNECTION_VARIABLE: self._postgres.url}
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(self.port)]
        self._start(SERVER, argv, {**self._env, **database})
        self._wait_until_healthy()

    def start_database(self) -> None:
        """Starts PostgreSQL, unless it is running, cannot run here, or the environment names another database."""
        if self._postgres is None and CONNECTION_VARIABLE not in self._env:
            found = find_postgres(self.folder.root)
            if isinstance(found, Postgres):
                self._postgres = found
            else:
                self.sqlite_reason = found
        running = self._started.get(DATABASE)
        if self._postgres is not None and (running is None or running.poll() is not None):
            self._postgres.initialize()
            # `setpriv` in its command line ends it with this process.
            process = self._start(DATABASE, self._postgres.argv, dies_with_parent=False)
            self._postgres.wait_until_ready(lambda: process.poll() is not None)

    def start_worker(self) -> None:
        """Starts the worker, which creates the work pool if there is none."""
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--type", WORKER_TYPE, "--pool", WORK_POOL]
        self._start(WORKER, argv)

    def start_dashboard(self) -> None:
        """Starts the dashboard of all runs, which finds new chains by itself."""
        if self._dashboard_port is None:
            self._dashboard_port = free_port(DASHBOARD_PORT)
        runs_dir, port = f"{self.folder.root.parent}/", str(self._dashboard_port)
        argv = [sys.executable, "-m", "weightline", "dashboard", runs_dir, "--port", port]
        self._start(DASHBOARD, [*argv, "--prefect-ui", self.ui_url])

    def keep_up(self) -> list[str]:
        """Restarts processes that died, and returns their names. LaunchError after too many restarts in ten minutes."""
        starts = {
            DATABASE: self.start_database, SERVER: self.start_server,
            WORKER: self.start_worker, DASHBOARD: self.start_dashboard,
        }  # fmt: skip
        dead = [name for name, process in self._started.items() if process.poll() is not None]
        for name in dead:
            now = time.monotonic()
            self._restarted_at = [at for at in self._restarted_at if now - at < _RESTARTS_SECONDS] + [now]
            if len(self._restarted_at) > _MAX_RESTARTS:
                raise LaunchError(f"the {name} died again and again: see {self.folder.log_path(name)}", name=name)
            starts[name]()
        return dead

    def end(self) -> None:
        """Ends every process of the folder's stack, in the reverse order of their starts. Safe to repeat."""
        record = StackRecord.load(self.folder.record_path)
        if record is not None:
            record.end()
        for process in self._started.values():
            process.wait()
        self._started.clear()
        end_replicas(self.folder.replicas_dir)
        self.folder.record_path.unlink(missing_ok=True)

    def _start(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, dies_with_parent: bool = True
    ) -> subprocess.Popen[bytes]:
        with self.folder.log_path(name).open("ab") as log:
            process = start_process(
                argv, env=env or self._env, stdout=log, stderr=subprocess.STDOUT, dies_with_parent=dies_with_parent
            )
        self._started[name] = process
        alive = {one: ProcessId.of(p.pid) for one, p in self._started.items() if p.poll() is None}
        if self.is_supervised:
            alive[SUPERVISOR] = ProcessId.of(os.getpid())
        vllm_python = None if self.vllm_python is None else str(self.vllm_python)
        StackRecord(self.api_url, self.ui_url, self.dashboard_url, alive, vllm_python).save(self.folder.record_path)
        return process

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + _SERVER_START_SECONDS
        while time.monotonic() < deadline:
            returncode = self._started[SERVER].poll()
            if returncode is not None:
                tail = self.folder.last_lines(SERVER)
                message = f"the Prefect server ended with exit code {returncode}. Its last lines:"
                raise LaunchError("\n    ".join([message, *tail]), returncode=returncode, tail=tail)
            if is_healthy(self.api_url):
                return
            time.sleep(0.2)
        raise LaunchError(f"the Prefect server did not come up: see {self.folder.log_path(SERVER)}", name=SERVER)


def free_port(preferred: int) -> int:
    """Returns the preferred port of the loopback interface if it is free, else another free port."""
    for port in (preferred, 0):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            return int(listener.getsockname()[1])
    raise InputError(f"no port of {HOST} is free", field="port")
