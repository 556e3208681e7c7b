"""The queue of batches: nothing lost, nothing doubled, nothing stale, and the same again after a restart."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.rollouts.seam import CHAIN, Seam, refuse, serving
from tests.rollouts.test_faults import PROMPTS, SAMPLING, _expected, _producer, _tokens
from tests.waiting import wait_until
from weightline.errors import InputError, RolloutError
from weightline.rollouts.batch import ReplicaShare, batch_of, shares_of
from weightline.rollouts.episode import BlockingSession, Session, Turn
from weightline.rollouts.fleet import Answered, ReplicaFleet
from weightline.rollouts.producer import Producer
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling
from weightline.rollouts.staleness import Lineage, StalenessRule


@pytest.fixture
def seam() -> Iterator[Seam]:
    with serving(Seam("one")) as found:
        yield found


def test_batches_are_made_ahead(seam: Seam) -> None:
    with _producer(seam) as producer:
        producer.request(0, PROMPTS, 0)
        producer.request(1, PROMPTS, 0)
        wait_until(lambda: len(seam.asked) == 6)
        assert producer.queue_length == 2
        assert _tokens(producer.take(0, PROMPTS).samples) == _expected(0, 0)
        taken = producer.take(1, PROMPTS)
        assert _tokens(taken.samples) == _expected(1, 0)
        assert taken.queue_length == producer.queue_length == 0
    assert len(seam.asked) == 6


def test_the_queue_is_bounded_and_its_prompts_are_checked(seam: Seam) -> None:
    with _producer(seam, max_batches=1) as producer:
        producer.request(0, PROMPTS, 0)
        producer.request(0, PROMPTS, 0)
        with pytest.raises(InputError, match="one too many: batches 0 are"):
            producer.request(1, PROMPTS, 0)
        with pytest.raises(InputError, match="other prompts"):
            producer.take(0, PROMPTS[::-1])
        with pytest.raises(InputError, match="token ids"):
            producer.take(0, ["text"])
        assert _tokens(producer.take(0, PROMPTS).samples) == _expected(0, 0)
    with pytest.raises(RolloutError, match="closed"):
        producer.request(1, PROMPTS, 0)


def test_stale_groups_are_made_again_and_no_other(seam: Seam) -> None:
    rule, lineage = StalenessRule(lookahead=1, staleness=1), Lineage()
    with _producer(seam) as producer:
        producer.request(0, PROMPTS, 0)
        wait_until(lambda: len(seam.asked) == 3)
        seam.version = 3
        stale = _expected(0, 0)[2]

        def is_fresh(sample: Sample) -> bool:
            return list(sample.token_ids) != stale or rule.is_fresh(sample, 3, lineage)

        taken = producer.take(0, PROMPTS, is_fresh, rule.min_version(3, lineage))
    first, again = _expected(0, 0), _expected(0, 3, attempt=1)
    assert _tokens(taken.samples) == [*first[:2], *again[2:4], *first[4:]]
    assert taken.num_regenerated == 2
    assert seam.headers[-1]["x-weightline-min-version"] == "2"


def test_what_stays_stale_is_an_error(seam: Seam) -> None:
    with _producer(seam) as producer, pytest.raises(RolloutError, match="still stale"):
        producer.take(0, PROMPTS, lambda sample: False)


@pytest.mark.parametrize("num_done", [0, 1, 3])
def test_a_snapshot_gives_back_what_was_made_and_asks_for_the_rest(num_done: int, seam: Seam) -> None:
    """Groups that were not made before the crash get the same samples after it."""
    with _producer(seam) as producer:
        wait_until(lambda: "serves" in producer.describe()[0])
        if num_done < 3:
            seam.faults.extend([lambda one, asked: None] * num_done)
            seam.faults.append(lambda one, asked: one.gate.clear() or refuse(503)(one, asked))
            seam.faults.extend([refuse(503)] * 50)
        producer.request(4, PROMPTS, 0)
        wait_until(lambda: len(seam.asked) > num_done if num_done < 3 else len(seam.asked) == 3)
        state = json.loads(json.dumps(producer.snapshot(wait_seconds=20.0 if num_done == 3 else 0.5)))
    (batch,) = state["batches"]
    num_kept = sum(group["samples"] is not None for group in batch["groups"])
    assert num_kept == 3 if num_done == 3 else num_kept < 3
    seam.faults.clear()
    seam.asked.clear()
    seam.gate.set()
    with _producer(seam) as producer:
        producer.restore(state)
        assert producer.queue_length == 1
        producer.request(4, PROMPTS, 0)
        assert _tokens(producer.take(4, PROMPTS).samples) == _expected(4, 0)
    assert sum(len(asked["prompts"]) for asked in seam.asked) == 3 - num_kept


def test_a_batch_that_waits_for_a_version_holds_no_checkpoint_up(seam: Seam) -> None:
    with _producer(seam) as producer:
        producer.request(4, PROMPTS, 9)
        state = producer.snapshot()
    assert [group["samples"] for group in state["batches"][0]["groups"]] == [None] * 3


def test_other_prompts_after_a_restart_are_made_anew(seam: Seam) -> None:
    with _producer(seam) as producer:
        producer.request(4, PROMPTS[::-1], 0)
        state = producer.snapshot()
    with _producer(seam) as producer:
        producer.restore(state)
        assert _tokens(producer.take(4, PROMPTS).samples) == _expected(4, 0)


@pytest.mark.parametrize(
    "state",
    [{}, {"format": 2, "batches": []}, {"format": 1}, {"format": 1, "batches": [{"k": 1}]},
     {"format": 1, "batches": [{"k": 1, "min_version": 0, "groups": [{"prompt_ids": [1], "n": 2, "samples": [{}]}]}]}],
)  # fmt: skip
def test_another_state_is_refused(state: dict[str, Any], seam: Seam) -> None:
    with _producer(seam) as producer, pytest.raises(InputError):
        producer.restore(state)


def test_an_evaluation_is_made_at_once_and_leaves_the_queue_alone(seam: Seam) -> None:
    with _producer(seam, max_batches=1) as producer:
        producer.request(0, PROMPTS, 9)
        taken = producer.generate(PROMPTS, min_version=0, key="eval-3", sampling=Sampling(n=1, max_tokens=4))
        assert len(taken.samples) == 6
        assert [asked["n"] for asked in seam.asked] == [1] * 6
        assert producer.queue_length == 1


def test_rows_are_grouped_by_equal_prompts_in_a_row() -> None:
    rows = [[1], [1], [1], [2], [1], [1]]
    assert batch_of("0", rows, 0, Sampling(n=2), is_tokens=True).rows == ((0, 1), (2,), (3,), (4, 5))
    assert batch_of("0", rows, 0, Sampling(n=2), is_tokens=False).rows == tuple((row,) for row in range(6))


def test_the_time_of_a_replica_counts_once_where_requests_overlap() -> None:
    answered = [
        Answered("a", 0.0, 2.0, 3),
        Answered("a", 1.0, 4.0, 1),
        Answered("a", 6.0, 7.0, 1),
        Answered("b", 1, 2, 1),
    ]
    assert shares_of(answered) == {"a": ReplicaShare(5, 5.0), "b": ReplicaShare(1, 1.0)}


# Episodes.


async def _echo(session: Session, prompt: Any) -> None:
    """Two turns: what the model wrote is answered with its first token and 50."""
    turn = await session.generate(prompt["ids"], max_tokens=4)
    session.observe([turn.token_ids[0], 50])
    turn = await session.generate([*session.context, 51], max_tokens=4)
    session.fields["last"] = turn.token_ids[0]


def _plain_echo(session: BlockingSession, prompt: Any) -> None:
    turn = session.generate(prompt["ids"], max_tokens=4)
    session.observe([turn.token_ids[0], 50])
    turn = session.generate([*session.context, 51], max_tokens=4)
    session.fields["last"] = turn.token_ids[0]


EPISODES = [{"ids": [1, 2]}, {"ids": [1, 2]}, {"ids": [3]}]


def test_an_episode_has_the_tokens_of_both_sides_and_the_version_of_each_turn(seam: Seam) -> None:
    with _producer(seam, play=_echo) as producer:
        producer.request(0, EPISODES, 0)
        taken = producer.take(0, EPISODES)
    with _producer(seam, play=_plain_echo) as producer:
        assert producer.take(0, EPISODES).samples == taken.samples
    first, second, third = taken.samples
    assert first.token_ids != second.token_ids
    assert third.prompt_ids == (3,)
    assert first.mask == (True, True, False, False, False, True, True)
    assert first.token_ids[2:5] == (first.token_ids[0], 50, 51)
    assert first.logprobs[2:5] == (0.0, 0.0, 0.0)
    assert [(span.version, span.num_tokens) for span in first.spans] == [(0, 4)]
    assert first.fields == {"last": first.token_ids[5]}
    assert taken.replicas["one"].num_samples == 6


def test_turns_of_two_versions_are_tagged_each(seam: Seam) -> None:
    async def moving(session: Session, prompt: Any) -> None:
        await session.generate(prompt, stop=(7,))
        seam.version = 1
        await asyncio.sleep(0)
        await session.generate()

    with _producer(seam, play=moving) as producer:
        (sample,) = producer.take(0, [[1]]).samples
    assert [(span.version, span.num_tokens) for span in sample.spans] == [(0, 2), (1, 2)]
    assert sample.mask is None


def test_a_function_that_fails_is_called_again_with_the_same_seed(seam: Seam) -> None:
    seeds: dict[str, list[int]] = {}

    async def flaky(session: Session, prompt: Any) -> None:
        seeds.setdefault(prompt[1], []).append(session.seed)
        await session.generate([prompt[0]])
        if len(seeds[prompt[1]]) == 1:
            raise ConnectionError("the environment is away")

    prompts = [[1, "a"], [1, "b"]]
    with _producer(seam, play=flaky) as producer:
        taken = producer.take(0, prompts)
    assert taken.num_retries == 2
    assert all(len(set(found)) == 1 and len(found) == 2 for found in seeds.values())
    assert len({found[0] for found in seeds.values()}) == 2


def test_a_function_that_goes_on_failing_ends_training_by_name(seam: Seam) -> None:
    def broken(session: BlockingSession, prompt: Any) -> None:
        raise ZeroDivisionError("of the user")

    with (
        _producer(seam, play=broken, max_attempts=2) as producer,
        pytest.raises(RolloutError, match="2 times on row 0 of batch 3: ZeroDivisionError: of the user"),
    ):
        producer.take(3, [[1]])


@pytest.mark.parametrize(
    ("second", "message"),
    [([9, 9], "do not begin with"), (None, "needs the tokens of its prompt"), ("silent", "without a turn")],
)
def test_a_wrong_use_of_the_session_is_named(second: Any, message: str, seam: Seam) -> None:
    async def wrong(session: Session, prompt: Any) -> None:
        if second == "silent":
            return
        if second is not None:
            await session.generate([1])
        await session.generate(second)

    with _producer(seam, play=wrong) as producer, pytest.raises(InputError, match=message):
        producer.take(0, [[1]])


def test_many_episodes_are_played_at_a_time_and_no_more_than_allowed(seam: Seam) -> None:
    lock, playing, most = threading.Lock(), [0], [0]
    everyone = threading.Barrier(3, timeout=60)

    def counted(session: BlockingSession, prompt: Any) -> None:
        with lock:
            playing[0] += 1
            most[0] = max(most[0], playing[0])
        everyone.wait()
        session.generate([1])
        with lock:
            playing[0] -= 1

    with _producer(seam, play=counted, max_episodes=3) as producer:
        assert len(producer.take(0, [[row] for row in range(6)]).samples) == 6
    assert most[0] == 3


def test_episodes_survive_a_restart(seam: Seam) -> None:
    with _producer(seam, play=_echo) as producer:
        producer.request(0, EPISODES, 0)
        wait_until(lambda: len(seam.asked) == 6)
        state = json.loads(json.dumps(producer.snapshot()))
        samples = producer.take(0, EPISODES).samples
    with _producer(seam, play=_echo) as producer:
        producer.restore(state)
        assert producer.take(0, EPISODES).samples == samples
    assert len(seam.asked) == 6


def test_the_session_passes_on_limits_and_stop_tokens() -> None:
    asked = []

    async def source(prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, prefer: str | None) -> Sample:
        asked.append((prompt_ids, sampling, seed, prefer))
        return Sample(prompt_ids, (), (), (), replica="r")

    async def two() -> list[Turn]:
        session = Session(source, Sampling(n=8, max_tokens=99, stop_token_ids=(3,)), 11)
        return [await session.generate([1], max_tokens=5, stop=[4]), await session.generate()]

    assert len(asyncio.run(two())) == 2
    (_, first, seed, none), (_, second, other_seed, again) = asked
    assert (first.n, first.max_tokens, first.stop_token_ids) == (1, 5, (3, 4))
    assert (second.max_tokens, second.stop_token_ids) == (99, (3,))
    assert seed != other_seed
    assert (none, again) == (None, "r")


def test_a_fleet_needs_a_replica() -> None:
    with pytest.raises(InputError, match="no replica is named"):
        ReplicaFleet(CHAIN, [])
    with pytest.raises(InputError, match="room for one batch"):
        Producer(ReplicaFleet(CHAIN, ["http://127.0.0.1:9"]), SAMPLING, max_batches=0)
