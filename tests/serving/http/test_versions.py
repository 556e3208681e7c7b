"""Requests for a version: the headers and the long poll of the embedded server, behind a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.model_chains import ModelChain, make_chain
from tests.serving.servers import RunningReplica, running_replica
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.errors import ErrorKind
from weightline.serving.http import client
from weightline.serving.http.errors import error_of

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "12+34=", "max_tokens": 4},
    "/weightline/rollouts": {"prompts": [[51, 43, 53]], "max_tokens": 4},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
}
PATIENT = {"x-weightline-wait-seconds": "600"}


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> ModelChain:
    url = (tmp_path_factory.mktemp("chain") / "toy").as_uri()
    return make_chain(url, num_versions=4, chat_template="{{ messages[0].content }}")


@pytest.fixture
def running(grown: ModelChain, tmp_path: Path) -> Iterator[RunningReplica]:
    with running_replica(grown.chain, tmp_path / "r", "r", version=1) as found:
        yield found


@pytest.fixture
def later() -> Iterator[Callable[..., Future[httpx.Response]]]:
    """Sends requests from threads of their own."""
    with ThreadPoolExecutor(16) as pool:
        yield lambda *arguments, **options: pool.submit(_ask, *arguments, **options)


def _ask(running: RunningReplica, headers: dict[str, str], route: str = "/weightline/rollouts") -> httpx.Response:
    return httpx.post(
        running.url + route, json=BODIES[route], headers=headers, timeout=PATIENCE_SECONDS, trust_env=False
    )


@pytest.mark.parametrize("route", BODIES)
def test_a_version_that_is_not_served_is_refused_with_the_one_that_is(running: RunningReplica, route: str) -> None:
    for asked in ({"x-weightline-min-version": "2"}, {"x-weightline-version": "0"}, {"x-weightline-version": "2"}):
        refused = _ask(running, asked, route)
        assert (refused.status_code, refused.headers["x-weightline-version"]) == (409, "1")
        error = error_of(refused.json(), "")
        assert (error.kind, error.facts) == (ErrorKind.VERSION_NOT_SERVED, {"version": 1})
    for asked in ({"x-weightline-min-version": "1"}, {"x-weightline-version": "1"}, {"x-weightline-min-version": "0"}):
        answer = _ask(running, asked, route)
        assert (answer.status_code, answer.headers["x-weightline-version"]) == (200, "1")
    refused = _ask(running, {"x-weightline-min-version": "new"}, route)
    assert (refused.status_code, refused.json()["error"]["facts"]) == (400, {"field": "x-weightline-min-version"})


def test_requests_wait_for_their_version_and_others_do_not(
    running: RunningReplica, later: Callable[..., Future[httpx.Response]]
) -> None:
    lowest = later(running, {"x-weightline-min-version": "2"} | PATIENT)
    pinned = later(running, {"x-weightline-version": "3"} | PATIENT, "/v1/completions")
    assert _ask(running, {}).headers["x-weightline-version"] == "1"
    running.service.refresh(2)
    assert lowest.result(PATIENCE_SECONDS).headers["x-weightline-version"] == "2"
    assert not pinned.done()
    running.service.refresh(3)
    assert pinned.result(PATIENCE_SECONDS).headers["x-weightline-version"] == "3"
    late = _ask(running, {"x-weightline-min-version": "9", "x-weightline-wait-seconds": "0.1"})
    assert (late.status_code, late.headers["x-weightline-version"]) == (409, "3")


def test_a_poll_ends_with_the_version_or_with_the_time(running: RunningReplica, grown: ModelChain) -> None:
    held = client.wait_for_version(running.url, 1, 600)
    assert (held.version, held.commit_id) == (1, grown.chain.manifest(1).commit_id)
    assert (held.moving_to, held.last_error) == (None, None)
    assert client.wait_for_version(running.url, 2, 0.1).version == 1
    with ThreadPoolExecutor(1) as pool:
        polling = pool.submit(client.wait_for_version, running.url, 3, 600)
        running.service.refresh(2)
        assert not polling.done()
        running.service.refresh(3)
        assert polling.result(PATIENCE_SECONDS).version == 3
    for query, field in (("min=-1", "min"), ("wait=601", "wait"), ("wait=x", "wait")):
        refused = httpx.get(f"{running.url}/weightline/version?{query}", trust_env=False, timeout=PATIENCE_SECONDS)
        assert (refused.status_code, refused.json()["error"]["facts"]) == (400, {"field": field})


def test_a_poll_says_why_the_replica_does_not_move(running: RunningReplica) -> None:
    running.replica.chain.store.put("commits/00000000000000000004.json", b"no manifest")
    with pytest.raises(Exception, match="manifest"):
        running.service.refresh(4)
    told = client.wait_for_version(running.url, 4, 0.0)
    assert told.version == 1
    assert told.last_error
    running.replica.chain.store.delete("commits/00000000000000000004.json")


def test_waiting_requests_are_bounded_hold_no_thread_and_end_with_their_client(
    running: RunningReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_threads = threading.active_count()
    poll = f"{running.url}/weightline/version?min=9&wait=600"
    asking = [httpx.Client(trust_env=False, timeout=0.5) for _ in range(3)]
    for one in asking:
        with pytest.raises(httpx.ReadTimeout):
            one.get(poll)
    assert threading.active_count() <= num_threads
    for one in asking:
        one.close()
    wait_until(lambda: not running.replica.watch._waiting)


def test_the_status_says_what_a_client_of_rollouts_needs(running: RunningReplica) -> None:
    told = client.status(running.url)
    assert (told.logprobs_mode, told.max_model_len, told.has_spans) == ("processed_logprobs", 128, False)
    assert told.rollout_routes == ("/weightline/rollouts", "/v1/completions")
