"""The front before real replicas: where requests go, by prefix and by version, and what it refuses."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.front.fronts import running_front, status, up
from tests.serving.model_chains import ModelChain
from tests.serving.servers import RunningReplica, running_replica
from tests.waiting import wait_until
from weightline.chain.read.leases import Lease, write_lease
from weightline.front.app import MAX_BODY_NBYTES
from weightline.serving.http.client import backoff_seconds
from weightline.serving.http.hosts import REPLICA_HOSTS_VARIABLE
from weightline.serving.http.weight_push import PUSH_ROUTES

Pair = tuple[str, RunningReplica, RunningReplica]


@pytest.fixture
def pair(grown: ModelChain, tmp_path: Path) -> Any:
    """A front with two replicas: `old` serves version 0, `new` version 1 of three."""
    with (
        running_replica(grown.chain, tmp_path / "old", "old", version=0) as old,
        running_replica(grown.chain, tmp_path / "new", "new", version=1) as new,
        running_front(grown.chain.url, tmp_path / "front", num_up=2) as url,
    ):
        yield url, old, new


def complete(url: str, prompt: object = "hello", **headers: object) -> httpx.Response:
    named = {f"x-weightline-{name.replace('_', '-')}": str(value) for name, value in headers.items()}
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
    return httpx.post(f"{url}/v1/completions", json=body, headers=named, trust_env=False, timeout=120)


def test_a_prefix_stays_at_one_replica_and_prefixes_spread(pair: Pair) -> None:
    url, old, new = pair
    homes: dict[str, set[str]] = {}
    for prompt in [f"prompt {number}" for number in range(12)] * 2:
        answer = complete(url, prompt)
        name = answer.headers["x-weightline-replica"]
        assert answer.headers["x-weightline-version"] == {"old": "0", "new": "1"}[name]
        direct = complete({"old": old, "new": new}[name].url, prompt)
        assert answer.json()["choices"] == direct.json()["choices"]
        homes.setdefault(prompt, set()).add(name)
    assert all(len(names) == 1 for names in homes.values())
    assert set.union(*homes.values()) == {"old", "new"}
    facts = status(url)
    assert facts["affinity"] == {"home": 24, "elsewhere": 0}
    assert sum(row["answered"] for row in facts["replicas"]) == facts["requests"] == 24


def test_versions_on_demand(pair: Pair) -> None:
    url, _, new = pair
    prompts = [f"prompt {number}" for number in range(6)]
    pinned = [complete(url, prompt, version=0) for prompt in prompts]
    assert {answer.headers["x-weightline-replica"] for answer in pinned} == {"old"}
    least = [complete(url, prompt, min_version=1) for prompt in prompts]
    assert {answer.headers["x-weightline-replica"] for answer in least} == {"new"}
    for headers in ({"min_version": 2}, {"version": 2}, {"min_version": 2, "wait_seconds": 0.1}):
        refused = complete(url, **headers)
        assert refused.status_code == 409
        assert refused.headers["x-weightline-version"] == "1"
        error = refused.json()["error"]
        assert error["code"] == "version-not-served"
        assert error["facts"] == {"version": 1, "replicas": {"old": 0, "new": 1}}
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(complete, url, prompt, min_version=2, wait_seconds=120) for prompt in prompts]
        new.service.refresh(2)
        answers = [one.result() for one in waiting]
    assert {(one.status_code, one.headers["x-weightline-version"]) for one in answers} == {(200, "2")}
    assert complete(url, min_version=2).headers["x-weightline-replica"] == "new"


def test_a_bad_version_is_named(pair: Pair) -> None:
    refused = complete(pair[0], min_version="newest")
    assert refused.status_code == 400
    assert refused.json()["error"]["facts"] == {"field": "x-weightline-min-version"}


def test_the_newest_version_is_waited_for(pair: Pair) -> None:
    url, old, _ = pair
    with httpx.Client(base_url=url, trust_env=False, timeout=240) as ask:
        _ask_for_the_newest(ask, old)


def _ask_for_the_newest(ask: httpx.Client, old: RunningReplica) -> None:
    held = ask.get("/weightline/version", params={"min": 2}).json()
    assert held["version"] == 1
    moving = threading.Thread(target=lambda: old.service.refresh(2))
    moving.start()
    moved = ask.get("/weightline/version", params={"min": 2, "wait": 120}).json()
    moving.join()
    assert moved["version"] == 2
    assert ask.get("/weightline/status").json()["replica"] == "old"
    assert ask.get("/ready").json() == {"status": "serving", "version": 2}
    assert ask.get("/v1/models").json()["data"][0]["root"] == old.replica.chain.url
    text = ask.get("/metrics").text
    assert 'weightline_front_replica_version{replica="old"} 2.0' in text
    assert ask.get("/weightline/version", params={"wait": "long"}).status_code == 400


def test_what_a_replica_refuses_is_passed_on(pair: Pair) -> None:
    refused = httpx.post(f"{pair[0]}/v1/completions", json={"prompt": "a", "sing": True}, trust_env=False)
    assert refused.status_code == 400
    assert "sing" in refused.json()["error"]["message"]
    not_json = httpx.post(f"{pair[0]}/v1/completions", content=b"{", trust_env=False)
    assert not_json.status_code == 400
    assert status(pair[0])["retries"] == {"total": 0}


def test_what_moves_a_replica_is_not_forwarded(pair: Pair) -> None:
    url, old, new = pair
    moved = httpx.post(f"{url}/weightline/refresh", json={"version": 2}, trust_env=False)
    assert moved.status_code == 404
    assert "send /weightline/refresh to a replica" in moved.json()["error"]["message"]
    assert (old.replica.version, new.replica.version) == (0, 1)
    for method, path in PUSH_ROUTES:
        refused = httpx.request(method, url + path, trust_env=False)
        assert refused.status_code == 501, path
        assert refused.json()["error"]["code"] == "unsupported-feature"
    large = httpx.post(f"{url}/v1/completions", content=b"0" * (MAX_BODY_NBYTES + 1), trust_env=False)
    assert large.status_code == 413


def test_a_replica_that_joins_or_leaves_is_noticed(pair: Pair, grown: ModelChain, tmp_path: Path) -> None:
    url, old, _ = pair
    with running_replica(grown.chain, tmp_path / "late", "late", version=2):
        assert wait_until(lambda: up(url), lambda found: len(found) == 3)["late"] == 2
        assert complete(url, min_version=2).headers["x-weightline-replica"] == "late"
    wait_until(lambda: up(url), lambda found: "late" not in found)
    assert complete(url, min_version=2).status_code == 409
    used = Counter(complete(url, f"prompt {number}").headers["x-weightline-replica"] for number in range(8))
    assert sum(used.values()) == 8
    assert old.name in used


def test_only_leases_of_trusted_hosts_get_requests(
    grown: ModelChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(REPLICA_HOSTS_VARIABLE, raising=False)
    for name, url in (("elsewhere", "http://replica.attacker.example:8000"), ("hidden", None)):
        write_lease(grown.chain, _lease(name, url))
    with running_front(grown.chain.url, tmp_path / "front", num_up=0, retry_seconds=0.1) as url:
        refused = wait_until(lambda: status(url)["refused"])
        assert refused["elsewhere"].startswith("WEIGHTLINE_REPLICA_HOSTS does not allow")
        assert "--advertise" in refused["hidden"]
        answer = complete(url)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no-replica"
        assert answer.json()["error"]["facts"]["replicas"].keys() == {"elsewhere", "hidden"}
        assert httpx.get(f"{url}/ready", trust_env=False).status_code == 503


def test_a_server_of_another_chain_gets_no_requests(grown: ModelChain, tmp_path: Path) -> None:
    other = grown.chain.url + "-of-another-run"
    with (
        running_replica(grown.chain, tmp_path / "a", "a", version=0) as replica,
        running_front(other, tmp_path / "front", num_up=0, replica_urls=(replica.url,), retry_seconds=0.1) as url,
    ):
        errors = wait_until(lambda: [row["error"] for row in status(url)["replicas"] if "follows" in row["error"]])
        assert errors == [f"it follows {grown.chain.url}"]
        assert complete(url).status_code == 503
    with (
        running_replica(grown.chain, tmp_path / "a", "a", version=0) as replica,
        running_front(grown.chain.url, tmp_path / "front", num_up=1, replica_urls=(replica.url,)) as url,
    ):
        assert up(url) == {replica.url: 0}
        assert complete(url).headers["x-weightline-replica"] == replica.url


def _lease(name: str, url: str | None) -> Lease:
    return Lease(
        replica=name, holder="h", engine="transformers", host="here", pid=7, release="0", url=url, follows=None,
        state="serving", renewed_at="2026-01-01T00:00:00Z", expires_at="2026-01-01T00:00:00Z", ttl_seconds=600,
    )  # fmt: skip


def test_a_pause_doubles_up_to_its_longest_however_many_failures_there_were() -> None:
    """A float has no room for 2 to the power of failures that a replica collects in an hour."""
    pauses = [backoff_seconds(num_failures, 0.2, 2.0) for num_failures in (1, 2, 3, 4, 5, 2000)]
    assert pauses == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
