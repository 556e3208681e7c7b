"""Moves a chain's replicas to one version, in place and in waves. Every commit starts this flow. Safe to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

from prefect import flow, get_run_logger

from weightline.chain.read.records import REFRESHES, Record
from weightline.errors import ApplyError
from weightline.evaluation.gate import ScoreGate
from weightline.fleet.rollout import Move, Rollout, RolloutSettings
from weightline.fleet.rollout_steps import advance, move_of
from weightline.flows.forms import ChainUrl, VersionNumber, label
from weightline.runs.checks import check_version
from weightline.tasks.lineage import draw_lineage
from weightline.tasks.serving import (
    conclude,
    find_newer,
    judge_version,
    move_replica,
    plan_rollout,
    skip_for_newer,
    take_back,
)
from weightline.tasks.waiting_runs import finish_waiting_runs


@flow(name="refresh-serving", flow_run_name="refresh to v{version}", persist_result=False)
def refresh_serving(
    chain: ChainUrl,
    version: VersionNumber,
    wave_size: Annotated[int, label("Replicas in a wave", ge=1)] = 4,
    canary: Annotated[str | None, label("Canary", min_length=1)] = None,
    min_score: Annotated[float | None, label("Lowest score")] = None,
    max_drop: Annotated[float | None, label("Largest drop of the score", ge=0, le=1)] = None,
    max_failed: Annotated[int, label("Replicas that may fail", ge=0)] = 0,
    task: Annotated[str | None, label("Task", min_length=1)] = None,
    limit: Annotated[int | None, label("Problems", ge=1)] = None,
    wait_seconds: Annotated[float, label("Wait for the evaluation (seconds)", ge=0)] = 60.0,
    allow_backward: Annotated[bool, label("Go back to an earlier version")] = False,
    or_newer: Annotated[bool, label("Serve the newest version instead, if there is a newer one")] = False,
) -> Record:
    """Move a chain's replicas to a version: first one and then, if the version passes the gate, the others in waves.

    The last step moves the ref `serving`, and with it the replicas that follow that ref. A replica that serves a later
    version keeps it.

    Args:
        chain: URL of the bucket and chain.
        version: The version to serve.
        wave_size: How many replicas move at the same time after the first one.
        canary: Name of the replica that moves first. Empty: the one that is furthest behind.
        min_score: Lowest score that the version must have to be served. Empty: any.
        max_drop: Largest relative drop of the score below the version served before, as in 0.05. Empty: any.
        max_failed: How many of the other replicas may fail to move before all of them are moved back.
        task: Task of lm-evaluation-harness whose score counts. Empty: that of the recipe of the version's run.
        limit: Number of problems, if this run measures the version. Empty: that of the recipe.
        wait_seconds: How long to wait for the evaluation that the commit started, before this run measures the version.
        allow_backward: Move replicas that serve a later version back to this one.
        or_newer: If the same training has committed a newer version meanwhile, move to the newest one, and record that
            this one and those between them were skipped. A milestone is always offered. Commits start the flow so.
    """
    settings = RolloutSettings(
        wave_size, canary, ScoreGate(min_score, max_drop), max_failed, allow_backward, task, limit, wait_seconds
    )
    check_version(chain, version)
    overtaken = find_newer(chain, version) if or_newer and not allow_backward else None
    if overtaken is None:
        return _roll_out(chain, version, settings)
    record = _roll_out(chain, overtaken.newer_version, settings)
    skip_for_newer(chain, overtaken)
    finish_waiting_runs(REFRESHES, chain, overtaken)
    return record


def _roll_out(chain: str, version: int, settings: RolloutSettings) -> Record:
    """Moves the replicas and records the outcome. ApplyError when the replicas could not be moved."""
    rollout = plan_rollout(chain, version, settings)
    record = rollout.outcome
    if record is None:
        reached = advance(rollout, partial(_move_wave, rollout), partial(judge_version, rollout))
        record = conclude(rollout, reached) if reached.problem is None else take_back(rollout, reached)
    draw_lineage(chain, version)
    message = f"version {version}: {record['status']}" + (f": {record['reason']}" if record.get("reason") else "")
    get_run_logger().info(message)
    if record["status"] == "failed":
        raise ApplyError(message, version=version)
    return record


def _move_wave(rollout: Rollout, names: Sequence[str]) -> list[Move]:
    """Moves replicas at the same time, each in a task run of its own, and waits for all of them."""
    futures = [(name, move_replica.submit(rollout, name)) for name in names]
    return [move_of(name, future.result(raise_on_failure=False)) for name, future in futures]
