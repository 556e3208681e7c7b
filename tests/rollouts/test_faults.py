"""What replicas answer when something is wrong with them, and what becomes of the work that they were given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from tests.rollouts.seam import CHAIN, Fault, Seam, answering, cut, refuse, sample_of, serving
from tests.waiting import wait_until
from weightline.errors import ApplyError, InputError, RolloutError, VersionNotServedError
from weightline.rollouts.client import Offer, ReplicaClient, Wanted
from weightline.rollouts.fleet import ReplicaFleet
from weightline.rollouts.producer import Producer
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling, seed_of

SAMPLING = Sampling(n=2, max_tokens=4)
PROMPTS = [[1, 2]] * 2 + [[3]] * 2 + [[4, 5, 6]] * 2
ROWS = [tuple(prompt) for prompt in PROMPTS]


@pytest.fixture
def one() -> Iterator[Seam]:
    with serving(Seam("one")) as seam:
        yield seam


@pytest.fixture
def two() -> Iterator[Seam]:
    with serving(Seam("two")) as seam:
        yield seam


def _producer(*seams: Seam, sampling: Sampling = SAMPLING, **options: Any) -> Producer:
    fleet = ReplicaFleet(CHAIN, [seam.url for seam in seams])
    return Producer(fleet, sampling, **{"seed": 5, "deadline_seconds": 60.0, "groups_per_request": 1} | options)


def _expected(k: int, version: int, *, attempt: int = 0) -> list[list[int]]:
    """The tokens of batch k, as the seeds of group and attempt make them."""
    found = []
    for row, prompt in enumerate(PROMPTS):
        seed = seed_of(5, 0, str(k), row // 2, attempt)
        found.append(sample_of(prompt, seed, row % 2, version)["token_ids"])
    return found


def _tokens(samples: tuple[Sample, ...]) -> list[list[int]]:
    assert [sample.prompt_ids for sample in samples] == ROWS
    return [list(sample.token_ids) for sample in samples]


def _broken() -> dict[str, Callable[[dict[str, Any]], Any]]:
    def sample(**changed: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda body: body["samples"][0][0].update(changed)

    return {
        "a group less": lambda body: body["samples"].pop(),
        "a group more": lambda body: body["samples"].append(body["samples"][0]),
        "a sample less": lambda body: body["samples"][0].pop(),
        "a logprob less": sample(logprobs=[-0.5]),
        "logprobs that are none": sample(logprobs=[None, None]),
        "a logprob that is no number": sample(logprobs=["x", -0.5]),
        "a logprob that is too large for float32": sample(logprobs=[-1e308, -0.5]),
        "ids that are texts": sample(token_ids=["a", "b"]),
        "ids that are halves": sample(token_ids=[0.5, 7]),
        "ids that are true": sample(token_ids=[True, 7]),
        "an id below zero": sample(token_ids=[-1, 7]),
        "more tokens than were asked for": sample(token_ids=[1] * 5, logprobs=[-1.0] * 5),
        "no ids": lambda body: body["samples"][0][0].pop("token_ids"),
        "a reason that is no text": sample(finish_reason=3),
        "a version that was not asked for": lambda body: body.update(version=0),
        "a version that is a text": lambda body: body.update(version="9"),
        "a version that is true": lambda body: body.update(version=True),
        "no version": lambda body: body.pop("version") and None,
        "a list": lambda body: [],
        "a number": lambda body: 5,
        "nothing": lambda body: "",
    }


@pytest.mark.parametrize("what", _broken())
def test_a_broken_answer_is_refused_by_name(what: str, one: Seam) -> None:
    one.version = 9
    one.faults.append(answering(_broken()[what]))
    with pytest.raises(ApplyError, match=one.url):
        _ask(one, Wanted(min_version=9))


def _ask(seam: Seam, wanted: Wanted, sampling: Sampling = SAMPLING) -> tuple[tuple[Sample, ...], ...]:
    async def ask() -> tuple[tuple[Sample, ...], ...]:
        client = ReplicaClient(seam.url, 20.0)
        try:
            offer = await client.status()
            return await client.generate(offer, [(1, 2), (3,)], [5, 6], sampling, wanted)
        finally:
            await client.close()

    return asyncio.run(ask())


def test_a_good_answer_becomes_samples(one: Seam) -> None:
    one.version = 9
    groups = _ask(one, Wanted(min_version=9))
    assert [[sample.prompt_ids for sample in group] for group in groups] == [[(1, 2)] * 2, [(3,)] * 2]
    drawn = sample_of([3], 6, 1, 9)
    assert list(groups[1][1].token_ids) == drawn["token_ids"]
    assert list(groups[1][1].logprobs) == drawn["logprobs"]
    assert groups[1][1].spans[0].version == 9
    assert groups[1][1].replica == "one"


def test_an_answer_without_end_is_refused(one: Seam) -> None:
    one.faults.append(answering(lambda body: body.update(more="x" * 3_000_000)))
    with pytest.raises(ApplyError, match="longer than"):
        _ask(one, Wanted())


def test_tokens_after_a_stop_token_are_cut_off(one: Seam) -> None:
    longer = {"token_ids": [4, 9, 5], "logprobs": [-1.0, -2.0, -3.0], "finish_reason": "length"}
    one.faults.append(answering(lambda body: body.update(samples=[[longer] * 2] * 2)))
    (sample, _), _ = _ask(one, Wanted(), replace(SAMPLING, stop_token_ids=(9,)))
    assert (sample.token_ids, sample.logprobs, sample.finish_reason) == ((4, 9), (-1.0, -2.0), "stop")
    assert sample.spans[0].num_tokens == 2


def test_the_version_and_the_wait_are_sent_and_a_refusal_names_what_is_held(one: Seam) -> None:
    one.version = 3
    with pytest.raises(VersionNotServedError) as caught:
        _ask(one, Wanted(min_version=4, mixing="allow"))
    assert (caught.value.version, caught.value.facts["url"]) == (3, one.url)
    sent = one.headers[0]
    assert (sent["x-weightline-min-version"], sent["x-weightline-wait-seconds"]) == ("4", "5")
    assert sent["x-weightline-mixing"] == "allow"
    assert Wanted(pinned=3).headers(0) == {"x-weightline-version": "3", "x-weightline-wait-seconds": "0"}


def test_a_prompt_that_is_too_long_is_refused_before_it_is_sent(one: Seam) -> None:
    one.max_model_len = 5
    with pytest.raises(InputError, match="over the 5"):
        _ask(one, Wanted())
    assert one.asked == []


def test_facts_under_names_that_no_error_takes_do_no_harm(one: Seam) -> None:
    body = {"error": {"message": "x", "code": "apply", "facts": {"message": "y", "self": 1}}}
    from starlette.responses import JSONResponse

    one.faults.append(lambda seam, asked: JSONResponse(body, 503))
    with pytest.raises(ApplyError, match="answered 503"):
        _ask(one, Wanted())


def test_routes_are_chosen_by_the_status() -> None:
    def route(*routes: str) -> str:
        return Offer(replica="r", chain="c", version=1, rollout_routes=routes).route

    assert route() == "/v1/completions"
    assert route("/of/later", "/inference/v1/generate", "/weightline/rollouts") == "/inference/v1/generate"
    assert route("/weightline/rollouts", "/v1/completions") == "/weightline/rollouts"


FAULTS: dict[str, Fault] = {
    "503": refuse(503),
    "500": refuse(500),
    "404": refuse(404),
    "409 without a version": refuse(409),
    "409 with an older one": refuse(409, {"x-weightline-version": "0"}),
    "cut": cut,
    "broken": answering(lambda body: body["samples"].pop()),
    "no JSON": lambda seam, asked: answering_text(),
}


def answering_text() -> Any:
    from starlette.responses import PlainTextResponse

    return PlainTextResponse("<html>")


@pytest.mark.parametrize("what", FAULTS)
def test_what_fails_is_made_again_with_the_same_seed(what: str, one: Seam) -> None:
    one.faults.append(FAULTS[what])
    with _producer(one) as producer:
        taken = producer.take(3, PROMPTS)
    assert _tokens(taken.samples) == _expected(3, 0)
    assert taken.num_retries == 1
    assert len(one.asked) == 4
    assert taken.replicas["one"].num_samples == 6


def test_what_fails_is_made_elsewhere(one: Seam, two: Seam) -> None:
    one.faults.extend([refuse(503)] * 100)
    with _producer(one, two) as producer:
        for k in range(3):
            taken = producer.take(k, PROMPTS)
            assert _tokens(taken.samples) == _expected(k, 0)
            assert taken.replicas.keys() == {"two"}
        shares = producer.shares()
    assert shares["two"].num_samples == 18
    assert shares["two"].samples_per_second > 0
    assert shares["one"].num_errors > 0
    assert all(asked["prompts"] for asked in two.asked)


def test_a_request_that_a_replica_refuses_ends_training_by_name(one: Seam) -> None:
    one.faults.append(refuse(400))
    with _producer(one) as producer, pytest.raises(InputError, match=one.url):
        producer.take(0, PROMPTS)


def test_work_is_split_over_replicas_by_group(one: Seam, two: Seam) -> None:
    one.gate.clear()
    two.gate.clear()
    with _producer(one, two, groups_per_request=16) as producer:
        wait_until(lambda: all("serves" in line for line in producer.describe()))
        producer.request(0, PROMPTS, 0)
        wait_until(lambda: one.asked and two.asked)
        one.gate.set()
        two.gate.set()
        taken = producer.take(0, PROMPTS)
    assert _tokens(taken.samples) == _expected(0, 0)
    assert sorted(len(seam.asked[0]["prompts"]) for seam in (one, two)) == [1, 2]


def test_a_replica_that_is_behind_gets_the_work_once_it_serves_the_version(one: Seam, two: Seam) -> None:
    with _producer(one, two) as producer:
        producer.request(0, PROMPTS, 5)
        wait_until(lambda: all("version 0" in line for line in producer.describe()))
        one.version = 4
        wait_until(lambda: any("version 4" in line for line in producer.describe()))
        assert not one.asked
        two.version = 6
        taken = producer.take(0, PROMPTS, min_version=5)
        assert _tokens(taken.samples) == _expected(0, 6)
        assert taken.behind_seconds > 0
    assert not one.asked
    assert one.num_looks < 50


def test_a_replica_that_returns_to_an_older_version_is_not_believed(one: Seam) -> None:
    """Its answer says what it holds: the request waits until it has the version again."""
    one.version = 5

    def reverted(seam: Seam, asked: Any) -> None:
        seam.version = 2

    one.faults.append(reverted)
    with _producer(one) as producer:
        producer.request(0, PROMPTS, 5)
        wait_until(lambda: any("version 2" in line for line in producer.describe()))
        one.version = 6
        assert _tokens(producer.take(0, PROMPTS, min_version=5).samples) == _expected(0, 6)


def test_refused_connections_are_waited_for() -> None:
    with ExitStack() as stack:
        first = Seam("one")
        with serving(first):
            url, port = first.url, int(first.url.rpartition(":")[2])
        producer = stack.enter_context(_producer(first))
        producer.request(0, PROMPTS, 0)
        wait_until(lambda: any("is away" in line for line in producer.describe()))
        with serving(Seam("again"), port) as again:
            assert again.url == url
            taken = producer.take(0, PROMPTS)
            assert _tokens(taken.samples) == _expected(0, 0)


def test_after_the_deadline_the_error_names_every_replica_and_why(one: Seam, two: Seam) -> None:
    one.version, two.version = 3, 1
    one.last_error = "config.json of version 4 has other values than the one that is served: restart the server"
    with _producer(one, two, deadline_seconds=1.5) as producer, pytest.raises(RolloutError) as caught:
        producer.take(7, PROMPTS, min_version=4)
    error = caught.value
    assert error.version == 4
    assert "6 of 6 samples of batch 7 by version 4 or later" in str(error)
    for text in (f"one at {one.url} serves version 3", "restart the server", f"two at {two.url} serves version 1"):
        assert any(text in line for line in error.replicas)
        assert text in str(error)


def test_a_replica_of_another_chain_or_with_other_logprobs_is_not_asked(one: Seam, two: Seam) -> None:
    one.chain = "memory://another"
    two.logprobs_mode = "raw_logprobs"
    sampling = replace(SAMPLING, temperature=0.7)
    with (
        _producer(one, two, sampling=sampling, deadline_seconds=1.5) as producer,
        pytest.raises(RolloutError) as caught,
    ):
        producer.take(0, PROMPTS)
    assert "memory://another" in str(caught.value)
    assert "raw_logprobs" in str(caught.value)
    assert not one.asked
    assert not two.asked
    with _producer(two) as producer:
        assert _tokens(producer.take(0, PROMPTS).samples) == _expected(0, 0)
