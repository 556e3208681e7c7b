"""A Hub for the length of the tests, and what opens a bucket of it."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.hub_emulator import HubEmulator, running_emulator

#: Of the clients: nothing may leave the emulator, and cut connections are tried again soon.
CLIENT_ENVIRONMENT = {
    "HF_TOKEN": "hf_test",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_XET_TELEMETRY_ENABLED": "0",
    "WEIGHTLINE_HUB_SETTLE_SECONDS": "0.05",
    "WEIGHTLINE_CACHE_NBYTES": "0",
}


@pytest.fixture(scope="session")
def hub_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubEmulator]:
    """One server for all tests: hf_xet remembers, by address, what a server holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf-home")))
        with running_emulator(tmp_path_factory.mktemp("hub")) as emulator:
            yield emulator


@pytest.fixture
def hub(hub_server: HubEmulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubEmulator]:
    """The server with its knobs at rest, and an environment that leads to it."""
    for name, value in (CLIENT_ENVIRONMENT | {"HF_ENDPOINT": hub_server.url}).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_S3_ACCESS_KEY_ID", "HF_S3_SECRET_ACCESS_KEY", "HF_S3_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    yield hub_server
    hub_server.fault_plan = hub_server.hold = None
    hub_server.list_lag_seconds = hub_server.info_lag_seconds = 0.0
    hub_server.failing_paths, hub_server.page_nitems = Counter(), 1000
    hub_server.roles.clear()
    hub_server.requests.clear()


@pytest.fixture
def hub_url(hub: HubEmulator) -> str:
    """A prefix of a bucket that does not exist yet."""
    return f"hf://buckets/user/bucket-{uuid.uuid4().hex[:12]}/chains/toy"


@pytest.fixture
def hub_s3_url(hub: HubEmulator, hub_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, with keys for the S3 gateway."""
    for name, value in gateway_environment(hub.url).items():
        monkeypatch.setenv(name, value)
    return hub_url


def gateway_environment(url: str) -> dict[str, str]:
    return {"HF_S3_ACCESS_KEY_ID": "HFAKtest", "HF_S3_SECRET_ACCESS_KEY": "secret", "HF_S3_ENDPOINT": f"{url}/s3"}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between its own tries, a thousand times shorter."""

    def sleep(seconds: float) -> None:
        time.sleep(seconds / 1000)

    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=sleep, time=time.time))
