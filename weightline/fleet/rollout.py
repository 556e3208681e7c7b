"""A rollout: its plan, with the order of moves and the previous version of every replica, and its outcome.

`records/rollouts/<version>/plan.json` is written before the first replica moves, so that a run that is restarted after
a crash has the previous version of every replica; `outcome.json` is written at the end. A rollout to an earlier version
has other record names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from weightline.chain import Chain
from weightline.chain.read.records import ROLLOUTS, Record, read_record, write_record
from weightline.chain.read.refs import move_ref, newest_move
from weightline.errors import CorruptError, UnsupportedFeatureError, WeightlineError
from weightline.evaluation.gate import ScoreGate, Verdict
from weightline.fleet.members import Fleet, ReachableReplica
from weightline.fleet.waves import Member, WavePlan, plan_waves
from weightline.serving.replica.following import SERVING_REF
from weightline.serving.replica.status import RefreshFacts


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """The parameters of the flow `refresh-serving`."""

    wave_size: int = 4
    canary: str | None = None
    gate: ScoreGate = field(default_factory=ScoreGate)
    max_failed: int = 0
    allow_backward: bool = False
    task: str | None = None
    limit: int | None = None
    wait_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """The planned moves of a chain's replicas to one version. `outcome` is set when there is nothing left to do."""

    chain: str
    version: int
    settings: RolloutSettings
    fleet: Fleet
    plan: WavePlan
    came_from: Mapping[str, int | None]
    attempt: str
    outcome: Record | None = None

    def replica(self, name: str) -> ReachableReplica:
        """Returns the replica of that name."""
        return next(one for one in self.fleet.reached if one.name == name)

    @property
    def has_begun(self) -> bool:
        """Returns whether an earlier run of this rollout moved a replica before it ended."""
        return any(one.version == self.version != self.came_from[one.name] for one in self.fleet.reached)

    @property
    def can_go_back(self) -> bool:
        """Returns whether the canary has a version to return to. Without one it does not move before the verdict."""
        return self.served_before is not None

    @property
    def served_before(self) -> int | None:
        """Returns the version that the canary served before the rollout; None without one."""
        return None if self.plan.canary is None else self.came_from.get(self.plan.canary)


@dataclass(frozen=True, slots=True)
class Move:
    """The result of moving one replica. Exactly one of `facts` and `error` is set."""

    name: str
    facts: RefreshFacts | None = None
    error: WeightlineError | None = None

    @property
    def is_away(self) -> bool:
        """Returns whether the replica did not answer. It catches up by itself, or with the next version."""
        return self.error is not None and bool(self.error.facts.get("is_unreachable"))

    @property
    def is_failed(self) -> bool:
        return self.error is not None and not self.is_away


def open_rollout(chain: Chain, version: int, settings: RolloutSettings, fleet: Fleet) -> Rollout:
    """Plans the rollout and writes the plan. Safe to repeat: the plan of an earlier run is kept.

    The outcome of a version that was rolled back is final and is returned. A version that is done is rolled out again
    to replicas that did not answer before.
    """
    chain.header(version)
    attempt = f"back-{datetime.now(UTC):%Y%m%dT%H%M%S%f}-" if settings.allow_backward else ""
    outcome = read_record(chain, ROLLOUTS, version, f"{attempt}outcome")
    members = [one.member for one in fleet.reached]
    standing = read_record(chain, ROLLOUTS, version, f"{attempt}plan") if outcome is None else None
    if standing is not None:
        members = [Member(one.name, standing["came_from"].get(one.name, one.version)) for one in members]
    if outcome is not None and outcome["status"] == "done":
        settings, outcome = replace(settings, gate=ScoreGate()), None
    plan = plan_waves(
        members, version,
        wave_size=settings.wave_size, canary=settings.canary, allow_backward=settings.allow_backward,
    )  # fmt: skip
    came_from = {member.name: member.version for member in members}
    rollout = Rollout(chain.url, version, settings, fleet, plan, came_from, attempt, outcome)
    if outcome is None:
        _write(chain, rollout, "plan", {"status": "started", "waves": plan.waves, "came_from": came_from})
    return rollout


def problem_of(moves: Sequence[Move], max_failed: int) -> str | None:
    """Returns why the rollout cannot continue; None when it can.

    It stops when the canary did not move, or when more than `max_failed` others failed. Replicas that did not answer
    do not count as failed.
    """
    if not moves:
        return None
    canary, *others = moves
    if canary.error is not None:
        return f"{canary.name} could not move: {canary.error}"
    failed = [move for move in others if move.is_failed]
    if len(failed) > max_failed:
        return "; ".join(f"{move.name} could not move: {move.error}" for move in failed)
    return None


def is_for_good(error: WeightlineError | None) -> bool:
    """Returns whether a retry cannot succeed: the bucket's content is wrong, unsigned, or not supported."""
    return isinstance(error, CorruptError | UnsupportedFeatureError)


def write_outcome(
    chain: Chain, rollout: Rollout, status: str, moves: Sequence[Move], verdict: Verdict | None, reason: str | None
) -> Record:
    """Writes the outcome: `done`, `rolled_back`, `skipped` or `failed`. The first outcome of a rollout is kept."""
    outcome: Record = {
        "status": status,
        "reason": reason,
        "moved": [move.name for move in moves if move.facts is not None],
        "away": [move.name for move in moves if move.is_away],
        "failed": {move.name: str(move.error) for move in moves if move.is_failed},
        "followers": list(rollout.fleet.others),
        "ungated": list(rollout.fleet.ungated),
        "score": verdict.score if verdict else None,
        "baseline_version": verdict.baseline.version if verdict and verdict.baseline else None,
        "baseline_score": verdict.baseline.score if verdict and verdict.baseline else None,
    }
    return _write(chain, rollout, "outcome", outcome)


def advance_serving_ref(chain: Chain, rollout: Rollout) -> None:
    """Moves the ref `serving` to the version, so that replicas that follow the ref move.

    The ref does not move to an earlier version unless the rollout has `allow_backward`.
    """
    newest = newest_move(chain, SERVING_REF)
    if newest is None or newest.version < rollout.version or rollout.settings.allow_backward:
        move_ref(chain, SERVING_REF, rollout.version)


def serving_version(chain: Chain) -> int | None:
    """Returns the version that the ref `serving` names."""
    newest = newest_move(chain, SERVING_REF)
    return None if newest is None else newest.version


def _write(chain: Chain, rollout: Rollout, what: str, record: Record) -> Record:
    return write_record(chain, ROLLOUTS, rollout.version, f"{rollout.attempt}{what}", record)
