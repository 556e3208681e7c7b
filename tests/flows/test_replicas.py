"""Finding the inference server of a chain, and starting it where a local stack has none yet."""

from __future__ import annotations

import fcntl
from pathlib import Path

import psutil
import pytest

from tasks import replicas
from tasks.replicas import REPLICAS_DIR_VARIABLE, end_replicas, ensure_replica
from tasks.serving import SERVING_URL_VARIABLE, find_replica
from tests.receiver.model_chains import make_chain
from weightline.errors import ApplyError, InputError, LaunchError
from weightline.receiver import client


def test_without_a_stack_or_a_url_the_remedy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.delenv(REPLICAS_DIR_VARIABLE, raising=False)
    with pytest.raises(InputError, match="WEIGHTLINE_SERVING_URL"):
        find_replica("memory://x")


def test_a_replica_that_is_away_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SERVING_URL_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(ApplyError, match="is it running"):
        find_replica("memory://x")


@pytest.mark.slow
def test_a_stack_starts_one_replica_and_moves_on_to_the_newest_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_chain((tmp_path / "first").as_uri(), num_versions=2).chain
    second = make_chain((tmp_path / "second").as_uri()).chain
    monkeypatch.delenv(SERVING_URL_VARIABLE, raising=False)
    monkeypatch.setenv(REPLICAS_DIR_VARIABLE, str(tmp_path / "replicas"))
    try:
        address = find_replica(first.url)
        assert client.refresh(address.url, address.token, 1).version == 1
        (process,) = replicas._running.values()
        assert ensure_replica(first.url, tmp_path / "replicas") == address
        assert next(iter(replicas._running.values())) is process

        other = find_replica(second.url)
        assert client.status(other.url).chain == second.url
        assert process.poll() is not None

        psutil.Process(next(iter(replicas._running.values())).pid).kill()
        back = find_replica(second.url)
        assert client.refresh(back.url, back.token, 0).version == 0
    finally:
        end_replicas()
    assert replicas._running == {}


@pytest.mark.slow
def test_a_server_that_does_not_come_up_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with (tmp_path / "x" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another replica on the same folder would
        try:
            with pytest.raises(LaunchError, match="in use by another replica"):
                ensure_replica((tmp_path / "chains" / "x").as_uri(), tmp_path)
        finally:
            end_replicas()
