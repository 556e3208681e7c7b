"""Every store of the house, by its URL: in memory, in a folder, and behind the servers that stand in for services."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.hub_fixtures import hub, hub_s3_url, hub_server, hub_url, hurried  # noqa: F401
from tests.store.proxy import Proxy, running_proxy
from tests.store.servers import (
    S3_ENVIRONMENT,
    azure_environment,
    azurite_command,
    azurite_server,
    create_azure_container,
    create_s3_bucket,
    moto_server,
)
from weightline.store import Store, open_store

#: `hub`: these tests' own emulator. `gs`: the S3 server behind a proxy that translates the one header that differs.
STORES = ["memory", "local", "s3", "az", "gs", "hub"]


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    with moto_server() as port:
        yield port


@pytest.fixture(scope="session")
def azure_port() -> Iterator[int]:
    if azurite_command() is None:
        pytest.skip("Azure's emulator is not here: make test installs it where npm is")
    with azurite_server() as port:
        yield port


@pytest.fixture
def s3_url(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of a new bucket, with the environment that opens it."""
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    create_s3_bucket(s3_port, bucket)
    return f"s3://{bucket}/chains/toy"


@pytest.fixture
def s3_proxy(s3_url: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """`s3_url` goes through it."""
    with running_proxy(s3_port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.fixture
def az_url(azure_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in azure_environment(azure_port).items():
        monkeypatch.setenv(name, value)
    container = f"container-{uuid.uuid4().hex[:12]}"
    create_azure_container(azure_port, container)
    return f"az://{container}/chains/toy"


@pytest.fixture
def gs_url(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    bucket = f"bucket{uuid.uuid4().hex[:12]}"
    create_s3_bucket(s3_port, bucket)
    with running_proxy(s3_port) as proxy:
        proxy.translated_headers = {("x-goog-if-generation-match", "0"): ("If-None-Match", "*")}
        proxy.added_reply_headers = {"x-goog-generation": "1"}
        monkeypatch.setenv("GOOGLE_BASE_URL", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "test")
        yield f"gs://{bucket}/chains/toy"


@pytest.fixture
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Parametrize indirectly with names of STORES."""
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    if request.param == "local":
        return (tmp_path / "bucket").as_uri()
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(any_url: str) -> Store:
    return open_store(any_url)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `store` and says nothing else runs on every one."""
    if "any_url" in metafunc.fixturenames and not any(
        "any_url" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("any_url", STORES, indirect=True)
