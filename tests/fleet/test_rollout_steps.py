"""The order in which a rollout moves waves and judges. tests/tasks/test_serving.py does the same with real replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from weightline.errors import ApplyError
from weightline.evaluation.gate import Verdict
from weightline.fleet.members import Fleet, ReachableReplica
from weightline.fleet.rollout import Move, Rollout, RolloutSettings
from weightline.fleet.rollout_steps import Advance, advance, move_of
from weightline.fleet.waves import Member, plan_waves
from weightline.serving.replica.status import RefreshFacts

PASSED = Verdict(0.9, None, None)
TOO_BAD = Verdict(0.1, None, "its score 0.1 is below 0.5")
ALL_AT_0: dict[str, int | None] = {"r-0": 0, "r-1": 0, "r-2": 0}


class Steps:
    """Does what the flow's tasks do, and keeps the order."""

    def __init__(self, known: Verdict | None, measured: Verdict = PASSED, failing: Sequence[str] = ()) -> None:
        self.known, self.measured, self.failing = known, measured, failing
        self.order: list[str] = []

    def move(self, names: Sequence[str]) -> list[Move]:
        self.order += names
        return [self._move(name) for name in names]

    def _move(self, name: str) -> Move:
        return move_of(name, ApplyError(f"{name} is broken") if name in self.failing else _facts(name))

    def judge(self, may_measure: bool) -> Verdict | None:
        self.order.append("measure" if may_measure else "judge")
        return self.known or (self.measured if may_measure else None)

    def run(self, rollout: Rollout) -> Advance:
        return advance(rollout, self.move, self.judge)


def _facts(name: str) -> RefreshFacts:
    return RefreshFacts.model_construct(replica=name, version=1)


def _rollout(serving: Mapping[str, int | None], came_from: Mapping[str, int | None] | None = None) -> Rollout:
    """Of version 1. `came_from`: what an earlier run of it wrote down before it moved anything."""
    before = dict(serving if came_from is None else came_from)
    fleet = Fleet(tuple(ReachableReplica(name, f"http://{name}", at, "t") for name, at in serving.items()), ())
    plan = plan_waves([Member(*one) for one in before.items()], 1, wave_size=2)
    return Rollout("memory://x", 1, RolloutSettings(), fleet, plan, before, "")


def test_a_version_with_a_score_is_judged_before_any_replica_moves() -> None:
    steps = Steps(known=TOO_BAD)
    assert steps.run(_rollout(ALL_AT_0)) == Advance((), TOO_BAD, TOO_BAD.reason)
    assert steps.order == ["judge"]


@pytest.mark.parametrize(
    ("measured", "order"),
    [(PASSED, ["judge", "r-0", "measure", "r-1", "r-2"]), (TOO_BAD, ["judge", "r-0", "measure"])],
)
def test_a_version_without_a_score_is_judged_when_the_canary_serves_it(measured: Verdict, order: list[str]) -> None:
    steps = Steps(known=None, measured=measured)
    reached = steps.run(_rollout(ALL_AT_0))
    assert (steps.order, reached.verdict, reached.problem) == (order, measured, measured.reason)


def test_a_canary_that_cannot_go_back_waits_for_the_verdict() -> None:
    steps = Steps(known=None, measured=TOO_BAD)
    assert steps.run(_rollout({"new": None})).moves == ()
    assert steps.order == ["measure"]


def test_a_wave_that_fails_is_the_last_one() -> None:
    steps = Steps(known=PASSED, failing=["r-0"])
    reached = steps.run(_rollout(ALL_AT_0))
    assert steps.order == ["judge", "r-0"]
    assert reached.problem == "r-0 could not move: r-0 is broken"


def test_replicas_that_serve_the_version_are_asked_after_the_waves() -> None:
    steps = Steps(known=PASSED)
    reached = steps.run(_rollout({"a-has-it": 1, "behind": 0}))
    assert steps.order == ["judge", "behind", "a-has-it"]
    assert [move.name for move in reached.moves] == ["behind", "a-has-it"]


def test_a_rollout_that_ended_half_way_takes_its_canary_along() -> None:
    steps = Steps(known=None, measured=TOO_BAD)
    reached = steps.run(_rollout(ALL_AT_0 | {"r-0": 1}, came_from=ALL_AT_0))
    assert steps.order == ["r-0", "measure"]
    assert [move.name for move in reached.moves] == ["r-0"]


def test_an_error_of_another_library_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        move_of("r-0", ZeroDivisionError())
