"""One Prefect server for all tests of a process that need one, as a local stack starts it: about ten seconds, once.

Prefect is imported by the fixtures, not with this module: most tests do without it.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    from weightline.deployments.stack.stack import Stack, StackFolder, free_port

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
