"""The steps of a rollout: move replicas wave by wave, judge the version, then conclude or move everything back.

This module does not import Prefect: `weightline.tasks.serving` runs each step as a task. Every step is safe to repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.read.overtaken import Overtaken
from weightline.chain.read.records import (
    EVALUATIONS,
    REFRESHES,
    Record,
    newest_records,
    read_record,
    recorded_versions,
    write_record,
)
from weightline.errors import WeightlineError
from weightline.evaluation.evaluate import wait_or_measure
from weightline.evaluation.gate import Verdict, baseline_of, judge, measured_score
from weightline.evaluation.task import EvaluationTask
from weightline.fleet.rollout import (
    Move,
    Rollout,
    advance_serving_ref,
    is_for_good,
    problem_of,
    serving_version,
    write_outcome,
)
from weightline.serving.http import client
from weightline.serving.replica.following import SERVING_REF, done_record, record_refresh
from weightline.serving.replica.status import RefreshFacts

_MAX_RETURNS_AT_ONCE = 16

MoveWave = Callable[[Sequence[str]], Sequence[Move]]
"""Moves the replicas of these names at the same time and waits for all of them."""
JudgeVersion = Callable[[bool], Verdict | None]
"""Judges the version. With True it measures the version if it has no score yet; with False it returns None then."""


@dataclass(frozen=True, slots=True)
class Advance:
    """The progress of a rollout. `problem` is the reason why it stopped; None when every wave has moved."""

    moves: tuple[Move, ...]
    verdict: Verdict | None
    problem: str | None


def advance(rollout: Rollout, move_wave: MoveWave, judge_version: JudgeVersion) -> Advance:
    """Moves one wave after the other, until a wave fails or the version does not pass the gate.

    A version that has a score is judged before the canary moves. One without a score is judged when the canary serves
    it, or before if the canary has no version to return to or no replica can be moved. If an earlier run of the same
    rollout ended before its end, the first wave moves before the judgment, so that its replicas move on, or back, with
    the others.
    """
    moves: list[Move] = []
    verdict = None if rollout.has_begun else judge_version(not rollout.can_go_back)
    problem = None if verdict is None else verdict.reason
    for wave in rollout.plan.waves if problem is None else ():
        moves += move_wave(wave)
        problem = problem_of(moves, rollout.settings.max_failed)
        if problem is None and verdict is None:
            verdict = judge_version(True)
            problem = None if verdict is None else verdict.reason
        if problem is not None:
            break
    if problem is None:
        moves += move_wave(rollout.plan.settled)
    return Advance(tuple(moves), verdict, problem)


def move_replica(rollout: Rollout, name: str) -> RefreshFacts:
    """Moves one replica to the version. A replica that serves it already does not move."""
    replica = rollout.replica(name)
    return client.refresh(
        replica.url, replica.token, rollout.version,
        chain=rollout.chain, allow_backward=rollout.settings.allow_backward,
    )  # fmt: skip


def move_of(name: str, result: RefreshFacts | BaseException) -> Move:
    """Returns the result of moving one replica as a Move. Raises errors that are not weightline's own."""
    if isinstance(result, RefreshFacts):
        return Move(name, result)
    if isinstance(result, WeightlineError):
        return Move(name, error=result)
    raise result


def judge_rollout(
    chain: Chain, rollout: Rollout, task: EvaluationTask, work_dir: Path, *, may_measure: bool
) -> Verdict | None:
    """Returns the gate's verdict on the version, by the record of its evaluation.

    Without a record it returns None; with `may_measure` it waits for the evaluation that the commit has started, and
    measures the version here after `wait_seconds`.
    """
    record = read_record(chain, EVALUATIONS, rollout.version, task.name)
    if record is None and not may_measure:
        return None
    record = record or wait_or_measure(chain, rollout.version, task, work_dir, rollout.settings.wait_seconds)
    served = serving_version(chain) if rollout.served_before is None else rollout.served_before
    earlier = () if served is None else newest_records(chain, EVALUATIONS, task.name, served)
    measured = next((one for one in earlier if measured_score(one) is not None), None)
    return judge(rollout.settings.gate, record, baseline_of([measured] if measured else [], served))


def conclude_rollout(chain: Chain, rollout: Rollout, reached: Advance) -> Record:
    """Records which replicas serve the version, and moves the ref `serving`, so that its followers move."""
    for move in reached.moves:
        if move.facts is not None:
            record_refresh(chain, rollout.version, move.name, move.facts)
    advance_serving_ref(chain, rollout)
    return write_outcome(chain, rollout, "done", reached.moves, reached.verdict, None)


def skip_overtaken(chain: Chain, overtaken: Overtaken) -> None:
    """Records that versions are skipped for a newer one, where no replica has a record of them. Safe to repeat.

    A replica records by itself which versions it has skipped. So these records are written only for versions of which
    no replica knows, as those before the first one of a new replica.
    """
    recorded = recorded_versions(chain, REFRESHES)
    for version in overtaken.versions:
        if version not in recorded:
            skipped: Record = {"status": "skipped", "newer_version": overtaken.newer_version}
            write_record(chain, REFRESHES, version, SERVING_REF, skipped)


def take_back_rollout(chain: Chain, rollout: Rollout, reached: Advance) -> Record:
    """Moves every replica of the attempted waves back to its previous version, and records the reason.

    A replica that cannot go back (it does not answer, or had no version before) stays; its record says so. Replicas of
    later waves get a record `skipped`. Raises the canary's error when it was temporary: then nothing is written, and
    the version can be rolled out again.
    """
    moves, reason = reached.moves, reached.problem
    if len(moves) == 1 and moves[0].error is not None and not is_for_good(moves[0].error):
        raise moves[0].error
    with ThreadPoolExecutor(max_workers=_MAX_RETURNS_AT_ONCE) as pool:
        returns = list(pool.map(lambda move: _go_back(chain, rollout, move.name), moves))
    for move, back in zip(moves, returns, strict=True):
        if move.facts is not None:
            returned = done_record(move.facts) | {"status": "rolled_back", "reason": reason} | back
            write_record(chain, REFRESHES, rollout.version, move.name, returned)
        elif move.error is not None and move.is_failed:
            failed: Record = {"status": "failed", "reason": str(move.error), "kind": move.error.kind}
            write_record(chain, REFRESHES, rollout.version, move.name, failed | back)
    attempted = {move.name for move in moves}
    for name in (name for wave in rollout.plan.waves for name in wave if name not in attempted):
        write_record(chain, REFRESHES, rollout.version, name, {"status": "skipped", "reason": reason})
    status = "rolled_back" if any(move.facts for move in moves) else "failed" if moves else "skipped"
    return write_outcome(chain, rollout, status, moves, reached.verdict, reason)


def _go_back(chain: Chain, rollout: Rollout, name: str) -> Record:
    """Moves one replica back, also after an error, since a replica that failed or did not answer may have moved."""
    came_from = rollout.came_from.get(name)
    target = serving_version(chain) if came_from is None else came_from
    if target is None or target == rollout.version:
        return {"returned_to": None}
    replica = rollout.replica(name)
    try:
        back = client.refresh(replica.url, replica.token, target, chain=rollout.chain, allow_backward=True)
    except WeightlineError as error:
        return {"returned_to": None, "error": str(error)}
    return {"returned_to": back.version, "returned_at": back.served_at}
