"""Which versions are evaluated."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chains import commit_state, nudged, random_state
from weightline.chain import open_chain
from weightline.errors import VersionNotFoundError
from weightline.evaluation.plan import Done, Evaluate, Skip, plan_evaluation
from weightline.format.manifest import Manifest

NUM_VERSIONS = 6
MILESTONES = {0, 3}


def _manifests() -> tuple[Manifest, ...]:
    chain = open_chain(f"memory://{uuid.uuid4().hex}/toy")
    states = [random_state(0)]
    commit_state(chain, states[0], is_milestone=True)
    for version in range(1, NUM_VERSIONS):
        states.append(nudged(states[-1], version))
        commit_state(chain, states[-1], states[-2], is_milestone=version in MILESTONES)
    return chain.manifests()


MANIFESTS = _manifests()


def test_the_newest_version_is_evaluated_and_an_older_one_skipped_for_it() -> None:
    assert plan_evaluation(MANIFESTS, [], 5) == Evaluate(5)
    assert plan_evaluation(MANIFESTS, [], 4) == Skip(4, newer_version=5)
    assert plan_evaluation(MANIFESTS[:5], [], 4) == Evaluate(4)


@pytest.mark.parametrize("milestone", sorted(MILESTONES))
def test_a_milestone_is_evaluated_however_late(milestone: int) -> None:
    assert plan_evaluation(MANIFESTS, [], milestone) == Evaluate(milestone)


@pytest.mark.parametrize("version", range(NUM_VERSIONS))
def test_what_has_a_record_is_done(version: int) -> None:
    record = {"version": version, "status": "skipped", "newer_version": 9}
    assert plan_evaluation(MANIFESTS, [record], version) == Done(version, record)


def test_a_version_that_is_not_in_the_chain_is_refused() -> None:
    with pytest.raises(VersionNotFoundError, match="version 6"):
        plan_evaluation(MANIFESTS, [], 6)


@given(st.lists(st.integers(0, NUM_VERSIONS - 1), max_size=12))
def test_whatever_events_came_catching_up_gives_every_version_a_record(requests: list[int]) -> None:
    """In any order, repeated or lost: afterwards all are recorded, milestones and the newest as measured."""
    records: dict[int, dict[str, object]] = {}
    caught_up = [plan_evaluation(MANIFESTS, [], manifest.version) for manifest in MANIFESTS]
    for plan in [*(plan_evaluation(MANIFESTS, records.values(), v) for v in requests), *caught_up]:
        if not isinstance(plan, Done):
            status = "done" if isinstance(plan, Evaluate) else "skipped"
            records.setdefault(plan.version, {"version": plan.version, "status": status})
    assert records.keys() == set(range(NUM_VERSIONS))
    assert {v for v, record in records.items() if record["status"] == "done"} == MILESTONES | {NUM_VERSIONS - 1}
    again = (plan_evaluation(MANIFESTS, records.values(), manifest.version) for manifest in MANIFESTS)
    assert all(isinstance(plan, Done) for plan in again)
