"""Evaluates one version, as a Prefect task."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from weightline.chain import open_chain
from weightline.chain.read.records import Record
from weightline.deployments.server.retries import retry_on
from weightline.errors import TransientStorageError
from weightline.evaluation.evaluate import evaluate_or_skip
from weightline.evaluation.task import check_name
from weightline.runs.checks import check_form
from weightline.runs.recipes import evaluation_dir, evaluation_task, recorded_recipe


@task(
    task_run_name="evaluate v{version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(TransientStorageError),
)  # fmt: skip
def evaluate(chain: str, version: int, task_name: str | None, limit: int | None) -> Record:
    """Evaluates the version, or records that a newer one is evaluated instead. The first record stands."""
    opened, work_dir = open_chain(chain), evaluation_dir()
    recipe = recorded_recipe(opened, version)
    with check_form("task"):
        evaluation = evaluation_task(recipe, task_name, limit, work_dir)
        if task_name is not None:
            check_name(evaluation)
    return evaluate_or_skip(opened, version, evaluation, work_dir)
