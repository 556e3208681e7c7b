"""The task of evaluation: which problems a version is measured on, and the measurement."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import Record, read_records
from weightline.errors import InputError, TransientStorageError
from weightline.evaluation.evaluate import evaluate_or_skip
from weightline.evaluation.task import ARITHMETIC, EvaluationTask, arithmetic_task, check_name
from weightline.runs.checks import check_form
from weightline.runs.folder import RUNS
from weightline.stages.arithmetic import write_heldout
from weightline.stages.load import parse_recipe
from weightline.stages.recipe import Recipe


def _may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A bucket that stutters: ask again."""
    return isinstance(state.result(raise_on_failure=False), TransientStorageError)


@task(
    task_run_name="evaluate v{version}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=_may_pass,
)
def evaluate(chain: str, version: int, task_name: str | None, limit: int | None) -> Record:
    """Measure the version, or record that a newer one took its place. Safe to repeat: the first record stands."""
    opened = open_chain(chain)
    recipe = recipe_of(opened, version)
    # One folder for all versions: the harness keeps its copy of the problems there.
    work_dir = Path(tempfile.gettempdir()) / "weightline-evaluation"
    with check_form("task"):
        asked = evaluation_task(recipe, task_name, limit, work_dir)
        if task_name is not None:
            check_name(asked)
    return evaluate_or_skip(opened, version, asked, work_dir)


def recipe_of(chain: Chain, version: int) -> Recipe | None:
    """The recipe of the run that committed the version, as recorded beside the chain. None for a run without one."""
    run_id = chain.manifest(version).run_id
    recorded: dict[str, Any] = {record["name"]: record["recipe"] for record in read_records(chain, RUNS)}
    return parse_recipe(recorded[run_id]) if run_id in recorded else None


def evaluation_task(recipe: Recipe | None, task_name: str | None, limit: int | None, work_dir: Path) -> EvaluationTask:
    """What to measure: what was asked for, else what the recipe says. The built-in problems are written if needed.

    InputError when neither says.
    """
    if recipe is None and task_name is None:
        raise InputError("no recipe is recorded for this version's run: name a task to evaluate it on", field="task")
    config = recipe.evaluation if recipe is not None else None
    name = task_name or (config.task if config is not None else ARITHMETIC)
    limit = limit or (config.limit if config is not None else None)
    batch_size = config.batch_size if config is not None else 64
    if name == ARITHMETIC and recipe is not None:
        problems = work_dir / f"arithmetic-{hash_of(recipe)}.jsonl"
        write_heldout(recipe.arithmetic, problems)
        return arithmetic_task(problems, limit, batch_size)
    include_path = Path(config.include_path).expanduser() if config is not None and config.include_path else None
    return EvaluationTask(name, include_path=include_path, limit=limit, batch_size=batch_size)


def hash_of(recipe: Recipe) -> str:
    """Tells the problems of one configuration from those of another."""
    return hashlib.sha256(recipe.arithmetic.model_dump_json().encode()).hexdigest()[:12]
