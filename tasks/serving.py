"""Moves a chain's replicas to a version, wave by wave, and back if it fails the gate, as Prefect tasks."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from weightline.chain import open_chain
from weightline.chain.read.overtaken import Overtaken, find_overtaken
from weightline.chain.read.records import Record
from weightline.deployments.server.retries import retry_on
from weightline.errors import ApplyError, TransientStorageError
from weightline.evaluation.gate import Verdict
from weightline.fleet import rollout_steps as steps
from weightline.fleet.members import find_fleet
from weightline.fleet.rollout import Rollout, RolloutSettings, open_rollout
from weightline.fleet.rollout_steps import Advance
from weightline.runs.recipes import evaluation_dir, evaluation_task, recorded_recipe
from weightline.serving.replica.following import SERVING_REF
from weightline.serving.replica.status import RefreshFacts


@task(
    task_run_name="find a newer version than v{version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(TransientStorageError),
)  # fmt: skip
def find_newer(chain: str, version: int) -> Overtaken | None:
    """Finds what the newest version of the same training has overtaken from `version` on; None where nothing."""
    return find_overtaken(open_chain(chain), version)


@task(
    task_run_name="skip versions for v{overtaken.newer_version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(TransientStorageError),
)  # fmt: skip
def skip_for_newer(chain: str, overtaken: Overtaken) -> None:
    """Records that versions are not offered to replicas, since a newer one is. Safe to repeat."""
    steps.skip_overtaken(open_chain(chain), overtaken)


@task(
    task_run_name="plan v{version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(ApplyError, TransientStorageError),
)  # fmt: skip
def plan_rollout(chain: str, version: int, settings: RolloutSettings) -> Rollout:
    """Finds the replicas, plans the waves, and writes the plan to the bucket. Safe to repeat."""
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
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(ApplyError, TransientStorageError),
)  # fmt: skip
def move_replica(rollout: Rollout, name: str) -> RefreshFacts:
    """Moves one replica to the version. Safe to repeat: a replica that serves it already does not move."""
    return steps.move_replica(rollout, name)


@task(task_run_name="judge the version", cache_policy=NO_CACHE, persist_result=False)
def judge_version(rollout: Rollout, may_measure: bool) -> Verdict | None:
    """Returns the gate's verdict, or None if there is no score and `may_measure` is False. Safe to repeat."""
    if rollout.settings.gate.is_open:
        return Verdict(None, None, None)
    opened, work_dir = open_chain(rollout.chain), evaluation_dir()
    recipe = recorded_recipe(opened, rollout.version)
    evaluation = evaluation_task(recipe, rollout.settings.task, rollout.settings.limit, work_dir)
    verdict = steps.judge_rollout(opened, rollout, evaluation, work_dir, may_measure=may_measure)
    if verdict is not None:
        passed = f"passed with score {verdict.score}"
        get_run_logger().info("version %d: %s", rollout.version, verdict.reason or passed)
    return verdict


@task(task_run_name="conclude", cache_policy=NO_CACHE, persist_result=False)
def conclude(rollout: Rollout, reached: Advance) -> Record:
    """Records since when each replica serves the version, and moves the ref that followers follow. Safe to repeat."""
    return steps.conclude_rollout(open_chain(rollout.chain), rollout, reached)


@task(task_run_name="take back", cache_policy=NO_CACHE, persist_result=False)
def take_back(rollout: Rollout, reached: Advance) -> Record:
    """Moves every replica back to its version before, all at the same time, and records why. Safe to repeat."""
    return steps.take_back_rollout(open_chain(rollout.chain), rollout, reached)
