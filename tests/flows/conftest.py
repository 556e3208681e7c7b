"""One Prefect server for all tests of flows: about ten seconds, once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import get_current_settings
from prefect.testing.utilities import prefect_test_harness

ROOT = Path(__file__).resolve().parents[2]


#: As in tasks.stack: nothing that writes for nothing to a database that lets one writer at a time.
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_ENABLED": "false",
}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """URL of a Prefect server's API, with a database of its own that goes with it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _QUIET.items():
            patch.setenv(name, value)
        with prefect_test_harness(server_startup_timeout=120):
            url = get_current_settings().api.url
            assert url is not None
            yield url


@pytest.fixture
def server_environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For child processes: this repository, that server."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PREFECT_API_URL", server)


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client
