"""The record of the samples that a version was trained on: what is written is bounded, and so is what is read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.chains import commit_state, random_state
from weightline.chain import open_chain
from weightline.chain.read.records import SAMPLES, read_record, write_record
from weightline.format import keys
from weightline.rollouts.record import (
    MAX_COMPLETIONS,
    MAX_GROUPS,
    MAX_NBYTES,
    MAX_TEXT_LENGTH,
    Completion,
    Group,
    ReplicaWork,
    SamplesRecord,
    Spread,
    parse_samples,
    plain_text,
    record_name,
)
from weightline.rollouts.sample import Span

HUGE = 10**400
RECORD = SamplesRecord(
    global_step=7,
    staleness=Spread(mean=1.25, max=2.0),
    wait_seconds=0.5,
    generate_seconds=1.5,
    num_regenerated=3,
    num_mixed=1,
    queue_length=1,
    made_by={5: 6, 6: 2},
    replicas={"replica-0": ReplicaWork(6, 1.5), "replica-1": ReplicaWork(2, 1.0)},
    ratio=Spread(1.0, 0.5, 1.5),
    logp_difference=Spread(mean=1e-6, max=1e-5),
    groups=(Group("2+3=", (Completion("5", 1.0, (Span(5, 1), Span(6, 1))), Completion("<b>6</b>", 0.0)), 8),),
)


def test_a_record_comes_back_from_a_bucket_as_it_was() -> None:
    chain = open_chain("memory://samples-record")
    commit_state(chain, random_state(0))
    name = record_name("grpo", RECORD.global_step)
    write_record(chain, SAMPLES, 0, name, RECORD.to_record())
    stored = read_record(chain, SAMPLES, 0, name)
    assert stored is not None
    assert stored["status"] == "done"
    assert parse_samples(stored) == RECORD
    assert RECORD.num_samples == 8
    assert RECORD.replicas["replica-0"].samples_per_second == 4.0
    assert ReplicaWork(3).samples_per_second is None


@pytest.mark.parametrize("letter", ["x", "\u20ac", "\U0001f600"])
def test_what_is_written_has_at_most_64_kib(letter: str) -> None:
    spans = tuple(Span(version, 1) for version in range(300))
    completions = tuple(Completion(f"{letter * 9_000}={number}", 0.5, spans) for number in range(100))
    groups = tuple(Group(f"prompt {number} {letter * 9_000}", completions) for number in range(10))
    made_by = dict.fromkeys(range(1_000), 8)
    replicas = {letter * 500 + str(number): ReplicaWork(1, 1.0) for number in range(500)}
    record = SamplesRecord(7, groups=groups, made_by=made_by, replicas=replicas)
    chain = open_chain(f"memory://samples-bound-{ord(letter)}")
    commit_state(chain, random_state(0))
    write_record(chain, SAMPLES, 0, "grpo-7", record.to_record())
    raw = chain.store.get(keys.record(SAMPLES, 0, "grpo-7"))
    assert len(raw) <= MAX_NBYTES
    found = parse_samples(json.loads(raw))
    assert found.groups[-1].prompt.startswith("prompt 9")
    assert found.groups[-1].num_completions == 100
    assert len(found.groups[-1].completions) == MAX_COMPLETIONS
    assert max(found.made_by) == 999


def test_of_many_groups_the_last_are_kept_whole_where_they_fit() -> None:
    groups = tuple(Group(f"prompt {number}", (Completion("answer", 1.0),)) for number in range(10))
    kept = parse_samples(SamplesRecord(7, groups=groups).to_record()).groups
    assert [group.prompt for group in kept] == [f"prompt {number}" for number in range(10 - MAX_GROUPS, 10)]
    assert kept[-1].completions == (Completion("answer", 1.0),)


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    text = plain_text("a" * 5_000 + "b" * 5_000)
    assert len(text) == MAX_TEXT_LENGTH
    assert text.startswith("aaa")
    assert text.endswith("bbb")
    assert " [...] " in text
    assert plain_text("x" * MAX_TEXT_LENGTH) == "x" * MAX_TEXT_LENGTH
    assert plain_text("half \ud800") == "half ?"
    assert plain_text(7) == ""


def test_numbers_that_json_cannot_hold_are_not_written() -> None:
    record = SamplesRecord(
        7,
        staleness=Spread(math.nan, None, math.inf),
        wait_seconds=math.inf,
        replicas={"r": ReplicaWork(1, math.nan)},
        groups=(Group("p", (Completion("t", math.nan),)),),
    )
    written = json.loads(json.dumps(record.to_record(), allow_nan=False))
    assert "wait_seconds" not in written
    found = parse_samples(written)
    assert found.staleness == Spread()
    assert found.replicas == {"r": ReplicaWork(1, None)}
    assert found.groups[0].completions == (Completion("t", None),)


HOSTILE: dict[str, dict[str, Any]] = {
    "empty": {},
    "numbers": {
        "global_step": HUGE, "wait_seconds": math.nan, "generate_seconds": -1, "num_regenerated": True,
        "num_mixed": 0.5, "queue_length": -3, "staleness": {"mean": HUGE, "min": "1", "max": math.inf},
    },
    "types": {
        "global_step": "7", "staleness": [1], "made_by": [5, 6], "replicas": "r", "ratio": None,
        "logp_difference": {"mean": {}}, "groups": {"prompt": "p"},
    },
    "counts": {"made_by": {"x": 1, "-3": 1, "\u00b2": 1, "9" * 400: 1, "5": HUGE, "6": "1", "7": True}},
    "work": {"replicas": {"a": 7, "b": {"num_samples": HUGE, "seconds": "x"}, "\ud800" * 10**6: {"seconds": 0}}},
    "groups": {"groups": [7, None, {"prompt": 7, "completions": 7}, {"completions": [7, {"text": {}, "spans": 7}]}]},
    "spans": {"groups": [{"completions": [{"spans": [[1], [1, 2, 3], "ab", [-1, 2], [HUGE, 1], [3, True]]}]}]},
    "huge": {
        "made_by": {str(number): number for number in range(10**5)},
        "replicas": {str(number): {"num_samples": 1} for number in range(10**5)},
        "groups": [{"prompt": "\ud800" * 10**6, "completions": [{"text": "x" * 10**5, "spans": [[1, 1]] * 10**5}] * 99}]
        * 99,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_is_stored_is_read_in_bounds(name: str) -> None:
    found = parse_samples(HOSTILE[name])
    assert len(found.made_by) <= 64
    assert len(found.replicas) <= 64
    assert len(found.groups) <= MAX_GROUPS
    for group in found.groups:
        assert len(group.prompt) <= MAX_TEXT_LENGTH
        assert len(group.completions) <= MAX_COMPLETIONS
        for one in group.completions:
            assert len(one.text) <= MAX_TEXT_LENGTH
            assert len(one.spans) <= 64
    texts = [one.text for group in found.groups for one in group.completions]
    assert sum(map(len, texts)) + sum(len(group.prompt) for group in found.groups) <= MAX_NBYTES
    json.dumps(found.to_record(), allow_nan=False, ensure_ascii=False).encode()
    for work in found.replicas.values():
        assert work.samples_per_second is None or work.samples_per_second >= 0


def test_what_is_wrong_in_a_record_is_left_out_and_the_rest_is_read() -> None:
    document = RECORD.to_record() | {
        "wait_seconds": "long",
        "ratio": {"mean": 1.0, "max": []},
        "made_by": {"5": 6, "x": 1},
    }
    document["groups"] = [*document["groups"], "no group"]
    found = parse_samples(document)
    assert found.wait_seconds is None
    assert found.ratio == Spread(mean=1.0)
    assert found.made_by == {5: 6}
    assert found.groups == RECORD.groups
