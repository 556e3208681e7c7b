"""The tasks of serving: find a chain's replicas, move them to a version, judge it, and take it back or conclude."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, Record, read_record, read_records, write_record
from weightline.errors import ApplyError, TransientStorageError, WeightlineError
from weightline.evaluation.evaluate import evaluate_version
from weightline.evaluation.gate import Verdict, baseline_of, judge
from weightline.evaluation.task import EvaluationTask
from weightline.fleet.members import find_fleet
from weightline.fleet.rollout import (
    Move,
    Rollout,
    RolloutSettings,
    advance_serving_ref,
    is_for_good,
    open_rollout,
    serving_version,
    write_outcome,
)
from weightline.serving.http import client
from weightline.serving.replica.following import SERVING_REF, done_record, record_refresh
from weightline.serving.replica.status import RefreshFacts
from weightline.tasks.evaluation import evaluation_task, recipe_of

_POLL_SECONDS = 1.0
_BACK_AT_ONCE = 16


def _may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A replica that is coming up or restarting, or a bucket that stutters: ask again."""
    return isinstance(state.result(raise_on_failure=False), ApplyError | TransientStorageError)


@task(
    task_run_name="plan v{version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=_may_pass,
)  # fmt: skip
def plan_rollout(chain: str, version: int, settings: RolloutSettings) -> Rollout:
    """Find the replicas, decide who moves when, and write that down. Safe to repeat."""
    opened = open_chain(chain)
    fleet = find_fleet(opened)
    if fleet.ungated and not settings.gate.is_open:
        get_run_logger().warning(
            "%s follow the tip and serve every version before its gate: start them with --ref %s",
            ", ".join(fleet.ungated), SERVING_REF,
        )  # fmt: skip
    return open_rollout(opened, version, settings, fleet)


@task(
    task_run_name="move {name}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=_may_pass,
)  # fmt: skip
def move_replica(rollout: Rollout, name: str) -> RefreshFacts:
    """Move one replica to the version. Safe to repeat: who serves it does not move."""
    replica = rollout.replica(name)
    return client.refresh(
        replica.url, replica.token, rollout.version,
        chain=rollout.chain, allow_backward=rollout.settings.allow_backward,
    )  # fmt: skip


def move_wave(rollout: Rollout, names: Sequence[str]) -> list[Move]:
    """Move some replicas at the same time, and wait for all of them."""
    futures = [(name, move_replica.submit(rollout, name)) for name in names]
    return [_move(name, future.result(raise_on_failure=False)) for name, future in futures]


def _move(name: str, result: RefreshFacts | BaseException) -> Move:
    if isinstance(result, RefreshFacts):
        return Move(name, result)
    if isinstance(result, WeightlineError):
        return Move(name, error=result)
    raise result


@task(task_run_name="judge the version", cache_policy=NO_CACHE, persist_result=False)
def judge_version(rollout: Rollout, *, may_measure: bool) -> Verdict | None:
    """The gate's verdict, by the record of the version's evaluation. Safe to repeat.

    Where there is none yet: None, or, when it may measure, wait for the evaluation that the commit has started, and
    measure the version here when that does not come.
    """
    gate, opened = rollout.settings.gate, open_chain(rollout.chain)
    if gate.is_open:
        return Verdict(None, None, None)
    work_dir = Path(tempfile.gettempdir()) / "weightline-evaluation"
    recipe = recipe_of(opened, rollout.version)
    evaluation = evaluation_task(recipe, rollout.settings.task, rollout.settings.limit, work_dir)
    record = read_record(opened, EVALUATIONS, rollout.version, evaluation.name)
    if record is None and not may_measure:
        return None
    record = record or _measure(opened, rollout, evaluation, work_dir)
    records = [one for one in read_records(opened, EVALUATIONS) if one["name"] == evaluation.name]
    before = rollout.served_before
    verdict = judge(gate, record, baseline_of(records, serving_version(opened) if before is None else before))
    get_run_logger().info("version %d: %s", rollout.version, verdict.reason or f"passed with score {verdict.score}")
    return verdict


def _measure(chain: Chain, rollout: Rollout, evaluation: EvaluationTask, work_dir: Path) -> Record:
    deadline = time.monotonic() + rollout.settings.wait_seconds
    while time.monotonic() < deadline:
        record = read_record(chain, EVALUATIONS, rollout.version, evaluation.name)
        if record is not None:
            return record
        time.sleep(_POLL_SECONDS)
    return evaluate_version(chain, rollout.version, evaluation, work_dir)


@task(task_run_name="conclude", cache_policy=NO_CACHE, persist_result=False)
def conclude(rollout: Rollout, moves: Sequence[Move], verdict: Verdict | None) -> Record:
    """Write down who serves the version since when, and let the followers move. Safe to repeat."""
    opened = open_chain(rollout.chain)
    for move in moves:
        if move.facts is not None:
            record_refresh(opened, rollout.version, move.name, move.facts)
    advance_serving_ref(opened, rollout)
    return write_outcome(opened, rollout, "done", moves, verdict, None)


@task(task_run_name="take back", cache_policy=NO_CACHE, persist_result=False)
def take_back(rollout: Rollout, moves: Sequence[Move], verdict: Verdict | None, reason: str) -> Record:
    """Move everybody who moved back to where they came from, at the same time, and write down why. Safe to repeat.

    Who cannot go back (away, or without a version before) is named in the record, and stays. Nobody who was not asked
    is moved. Where the canary failed by something that may pass, nothing is written: the version is offered again.
    """
    opened = open_chain(rollout.chain)
    if len(moves) == 1 and moves[0].error is not None and not is_for_good(moves[0].error):
        raise moves[0].error
    with ThreadPoolExecutor(max_workers=_BACK_AT_ONCE) as pool:
        returns = list(pool.map(lambda move: _go_back(opened, rollout, move.name), moves))
    for move, back in zip(moves, returns, strict=True):
        if move.facts is not None:
            told = done_record(move.facts) | {"status": "rolled_back", "reason": reason} | back
            write_record(opened, REFRESHES, rollout.version, move.name, told)
        elif move.is_failed:
            failed: Record = {"status": "failed", "reason": str(move.error), "kind": getattr(move.error, "kind", None)}
            write_record(opened, REFRESHES, rollout.version, move.name, failed | back)
    _pass_over(opened, rollout, {move.name for move in moves}, reason)
    status = "rolled_back" if any(move.facts for move in moves) else "failed" if moves else "skipped"
    return write_outcome(opened, rollout, status, moves, verdict, reason)


def _go_back(chain: Chain, rollout: Rollout, name: str) -> Record:
    """Whatever its answer was: one that failed, or seemed to be away, may have moved all the same."""
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


def _pass_over(chain: Chain, rollout: Rollout, moved: set[str], reason: str) -> None:
    """Who was not asked to move gets a word on it, too."""
    for name in (name for wave in rollout.plan.waves for name in wave if name not in moved):
        write_record(chain, REFRESHES, rollout.version, name, {"status": "skipped", "reason": reason})
