"""Evaluates one version, or the newest of its training instead, as Prefect tasks."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from weightline.chain import Chain, open_chain
from weightline.chain.read.overtaken import Overtaken, find_overtaken
from weightline.chain.read.records import EVALUATIONS, Record, read_record
from weightline.deployments.server.retries import retry_on
from weightline.errors import TransientStorageError
from weightline.evaluation.evaluate import measure_version, skip_overtaken
from weightline.evaluation.task import EvaluationTask, check_name
from weightline.runs.checks import check_form
from weightline.runs.recipes import evaluation_dir, evaluation_task, recorded_recipe


@task(
    task_run_name="evaluate v{version}", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(TransientStorageError),
)  # fmt: skip
def evaluate(chain: str, version: int, task_name: str | None, limit: int | None) -> Record:
    """Measures the version, unless it has a record. The first record stands."""
    opened = open_chain(chain)
    return measure_version(opened, version, _evaluation(opened, version, task_name, limit), evaluation_dir())


@task(
    task_run_name="skip v{version} for a newer version", cache_policy=NO_CACHE, persist_result=False,
    retries=2, retry_delay_seconds=2, retry_condition_fn=retry_on(TransientStorageError),
)  # fmt: skip
def skip_for_newer(
    chain: str, version: int, task_name: str | None, limit: int | None
) -> tuple[Record, Overtaken] | None:
    """Records that a newer version has overtaken this one and those between them. None where none has.

    None as well where the version has a record already. Safe to repeat.
    """
    opened = open_chain(chain)
    evaluation = _evaluation(opened, version, task_name, limit)
    if read_record(opened, EVALUATIONS, version, evaluation.name) is not None:
        return None
    overtaken = find_overtaken(opened, version)
    return None if overtaken is None else (skip_overtaken(opened, overtaken, evaluation), overtaken)


def _evaluation(chain: Chain, version: int, task_name: str | None, limit: int | None) -> EvaluationTask:
    recipe = recorded_recipe(chain, version)
    with check_form("task"):
        evaluation = evaluation_task(recipe, task_name, limit, evaluation_dir())
        if task_name is not None:
            check_name(evaluation)
    return evaluation
