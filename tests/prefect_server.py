"""One Prefect server for all tests of a process that need one, as a local stack starts it: about ten seconds, once.

Prefect is imported by the fixtures, not with this module: most tests do without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import ROOT

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prefect server's API, with a database of its own that goes with it. It looks at schedules often."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from weightline.deployments.prefect_private import drain_events
    from weightline.deployments.stack.folder import StackFolder
    from weightline.deployments.stack.stack import Stack, free_port

    folder = StackFolder.under(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS", "5")
        stack = Stack(folder, free_port(0))
    try:
        stack.start_server()
        with temporary_settings({PREFECT_API_URL: stack.api_url}):
            yield stack.api_url
            drain_events()
    finally:
        stack.end()


@pytest.fixture
def server_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For child processes: this repository, that server."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PREFECT_API_URL", server)


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


class Workers:
    """Workers of work pools, started as users start them."""

    def __init__(self, server: str, folder: Path, at_end: ExitStack) -> None:
        self._server = server
        self._folder = folder
        self._at_end = at_end
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, pool: str, queue: str, name: str = "worker", **environment: str) -> subprocess.Popen[bytes]:
        """Starts one that looks for runs, and sends heartbeats, more often than by default."""
        from weightline.launch.processes import ProcessTree, marked_environment

        env, mark = marked_environment({
            **os.environ, "PREFECT_API_URL": self._server, "PREFECT_WORKER_QUERY_SECONDS": "0.5",
            "PREFECT_WORKER_PREFETCH_SECONDS": "0", "PREFECT_WORKER_HEARTBEAT_SECONDS": "2", **environment,
        })  # fmt: skip
        argv = [sys.executable, "-m", "prefect", "worker", "start", "--type", "weightline"]
        argv += ["--pool", pool, "--work-queue", queue, "--name", name]
        log = self._at_end.enter_context((self._folder / f"{name}.log").open("ab"))
        process = subprocess.Popen(argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._at_end.callback(process.wait)
        self._at_end.callback(ProcessTree(process.pid, mark).end)
        self.processes[name] = process
        return process

    def output(self) -> str:
        """The last of what each of them printed."""
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}" for log in logs)


@contextmanager
def workers_in(folder: Path, server: str) -> Iterator[Workers]:
    """Workers that write their logs to the folder. They, and what they started, are ended at the end."""
    folder.mkdir()
    with ExitStack() as at_end:
        yield Workers(server, folder, at_end)


@pytest.fixture
def workers(tmp_path: Path, server: str) -> Iterator[Workers]:
    with workers_in(tmp_path / "workers", server) as found:
        yield found
