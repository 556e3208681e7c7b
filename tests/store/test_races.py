"""Several writers of one chain, on good and bad networks: no version is lost, none is there twice."""

from __future__ import annotations

import itertools

import pytest

from tests.hub_emulator.faults import Fault, LoseReply
from tests.store.proxy import Proxy
from tests.store.racers import race, race_in_threads


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "0")


@pytest.mark.parametrize("any_url", ["memory"], indirect=True)
def test_threads_race_in_memory(any_url: str) -> None:
    race_in_threads(any_url)


@pytest.mark.process
@pytest.mark.parametrize("any_url", ["local", "s3", "az", "gs"], indirect=True)
def test_processes_race(any_url: str) -> None:
    race(any_url)


def test_processes_race_while_replies_get_lost(s3_url: str, s3_proxy: Proxy) -> None:
    commits, lost = itertools.count(), []

    def plan(number: int, method: str, path: str) -> Fault | None:
        if method == "PUT" and "/commits/" in path and next(commits) % 3 == 0:
            lost.append(path)
            return LoseReply()
        return None

    s3_proxy.plan = plan
    race(s3_url)
    assert len(lost) >= 3


def test_processes_race_while_listings_lag(s3_url: str, s3_proxy: Proxy) -> None:
    s3_proxy.list_lag_seconds = 0.3
    race(s3_url)
