"""Move a chain's replicas to one version, in place, a few at a time. Started by every commit; safe to start again."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger

from weightline.errors import ApplyError
from weightline.evaluation.gate import ScoreGate, Verdict
from weightline.fleet.rollout import Move, Rollout, RolloutSettings, problem_of
from weightline.flows.forms import ChainUrl, VersionNumber, label
from weightline.runs.checks import check_version
from weightline.tasks.lineage import draw_lineage
from weightline.tasks.serving import conclude, judge_version, move_wave, plan_rollout, take_back


@flow(name="refresh-serving", flow_run_name="refresh to v{version}", persist_result=False)
def refresh_serving(
    chain: ChainUrl,
    version: VersionNumber,
    wave_size: Annotated[int, label("Replicas a wave", ge=1)] = 4,
    canary: Annotated[str | None, label("Canary", min_length=1)] = None,
    min_score: Annotated[float | None, label("Lowest score")] = None,
    max_drop: Annotated[float | None, label("Largest fall of the score", ge=0, le=1)] = None,
    max_failed: Annotated[int, label("Replicas that may fail", ge=0)] = 0,
    task: Annotated[str | None, label("Task", min_length=1)] = None,
    limit: Annotated[int | None, label("Problems", ge=1)] = None,
    wait_seconds: Annotated[float, label("Seconds to wait for the evaluation", ge=0)] = 60.0,
    allow_backward: Annotated[bool, label("Go back to an earlier version")] = False,
) -> dict[str, Any]:
    """Move a chain's replicas to a version: one first, then, if the version is good enough, the others in waves.

    Replicas that follow by themselves move when the ref `serving` does, which is the end of it. One that is further
    already stays there.

    Args:
        chain: URL of the bucket and chain.
        version: Which version.
        wave_size: How many replicas move at the same time after the first one.
        canary: Name of the replica that moves first. Empty: the one that is furthest behind.
        min_score: Lowest score that the version must have to be served. Empty: any.
        max_drop: Largest relative fall of the score below the version served before, as in 0.05. Empty: any.
        max_failed: How many of the other replicas may fail to move before all go back.
        task: Task of lm-evaluation-harness whose score counts. Empty: what the recipe of the version's run says.
        limit: Use the first so many problems if it has to be measured here. Empty: what the recipe says.
        wait_seconds: How long to wait for the evaluation that the commit has started before measuring here.
        allow_backward: Let replicas that serve a later version go back to this one.
    """
    settings = RolloutSettings(
        wave_size, canary, ScoreGate(min_score, max_drop), max_failed, allow_backward, task, limit, wait_seconds
    )
    check_version(chain, version)
    rollout = plan_rollout(chain, version, settings)
    record = rollout.outcome or _roll_out(rollout)
    draw_lineage(chain, version)
    told = f"version {version}: {record['status']}" + (f": {record['reason']}" if record.get("reason") else "")
    get_run_logger().info(told)
    if record["status"] == "failed":
        raise ApplyError(told, version=version)
    return record


def _roll_out(rollout: Rollout) -> dict[str, Any]:
    """What is known to be too bad does not even reach the canary; what is not known yet is judged when it is there,
    or before it, where the canary has nothing to go back to, or nobody can be moved from here.

    Where an earlier run of the same rollout ended half-way, whoever it moved goes on, or back, with the others.
    """
    moves: list[Move] = []
    verdict = None if rollout.has_begun else judge_version(rollout, may_measure=not rollout.can_go_back)
    problem = _reason(verdict)
    for wave in rollout.plan.waves if problem is None else ():
        moves += move_wave(rollout, wave)
        problem = problem_of(moves, rollout.settings.max_failed)
        if problem is None and verdict is None:
            verdict = judge_version(rollout, may_measure=True)
            problem = _reason(verdict)
        if problem is not None:
            break
    if problem is not None:
        return take_back(rollout, moves, verdict, problem)
    return conclude(rollout, moves + move_wave(rollout, rollout.plan.settled), verdict)


def _reason(verdict: Verdict | None) -> str | None:
    return None if verdict is None else verdict.reason
