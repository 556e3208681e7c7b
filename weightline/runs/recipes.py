"""Records the recipes of runs in the bucket of their chain, and reads the evaluation task of a version from them.

A consumer of a version gets only the chain's URL. From the record `runs/.../<run id>.json` it reads the task on which
the version is measured, and the start model for its model card.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.read.records import read_records, write_record
from weightline.errors import InputError
from weightline.evaluation.task import ARITHMETIC, EvaluationTask, arithmetic_task
from weightline.files import user_path
from weightline.stages.arithmetic import write_heldout
from weightline.stages.load import parse_recipe
from weightline.stages.recipe import Recipe

#: The kind of the records.
RUNS = "runs"


def record_recipe(chain: Chain, run_id: str, recipe: Recipe) -> None:
    """Writes the record of a run, at the version that it commits first. Safe to repeat: the first record is kept."""
    tip = chain.tip_version()
    record = {"status": "done", "recipe": recipe.model_dump(mode="json")}
    write_record(chain, RUNS, 0 if tip is None else tip + 1, run_id, record)


def recorded_recipe(chain: Chain, version: int) -> Recipe | None:
    """Reads the recipe of the run that committed the version. Returns None when the run recorded none."""
    run_id = chain.header(version).run_id
    recorded = {record["name"]: record for record in read_records(chain, RUNS)}
    return parse_recipe(recorded[run_id]["recipe"]) if run_id in recorded else None


def evaluation_dir() -> Path:
    """Returns this host's folder for evaluations. Versions share it, since the harness caches its data there."""
    return Path(tempfile.gettempdir()) / "weightline-evaluation"


def evaluation_task(recipe: Recipe | None, task_name: str | None, limit: int | None, work_dir: Path) -> EvaluationTask:
    """Returns the task to measure on: the one named, else the recipe's. Writes the built-in problems to `work_dir`.

    Raises InputError when neither names a task.
    """
    if recipe is None and task_name is None:
        raise InputError("no recipe is recorded for this version's run: name a task to evaluate it on", field="task")
    config = recipe.evaluation if recipe is not None else None
    name = task_name or (config.task if config is not None else ARITHMETIC)
    limit = limit or (config.limit if config is not None else None)
    batch_size = config.batch_size if config is not None else 64
    if name == ARITHMETIC and recipe is not None:
        problems = work_dir / f"arithmetic-{_problems_id(recipe)}.jsonl"
        write_heldout(recipe.arithmetic, problems)
        return arithmetic_task(problems, limit, batch_size)
    include_path = user_path(config.include_path) if config is not None and config.include_path else None
    return EvaluationTask(name, include_path=include_path, limit=limit, batch_size=batch_size)


def _problems_id(recipe: Recipe) -> str:
    """Returns a digest of the built-in data's configuration, so that two configurations never share a file."""
    return hashlib.sha256(recipe.arithmetic.model_dump_json().encode()).hexdigest()[:12]
