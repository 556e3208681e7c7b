"""Evaluation tasks of lm-evaluation-harness: by name, or the built-in one on a local file of problems."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from weightline.errors import InputError
from weightline.format.keys import checked_name

#: Name of the built-in task in records and results, and dataset path of its training data in recipes.
ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """One task and how to run it. Check it with `check_task` before any work.

    `name` keys the records. With `problems` (JSON lines of {question, answer}) it is the built-in task on that file,
    offline; without, it is a task that the harness finds, in `include_path` or its own collection.
    """

    name: str
    problems: Path | None = None
    include_path: Path | None = None
    limit: int | None = None
    """Number of problems to measure on, from the first. None: all."""
    batch_size: int = 64
    max_new_tokens: int | None = None
    """Longest answer of the built-in task. None: the value in its YAML file."""


def arithmetic_task(problems: Path, limit: int | None = None, batch_size: int = 256) -> EvaluationTask:
    """Returns the built-in task: exact match of greedy answers on held-out problems, offline."""
    return EvaluationTask(ARITHMETIC, problems=problems, limit=limit, batch_size=batch_size)


def check_task(task: EvaluationTask) -> None:
    """Raises InputError for a missing or empty file of problems, a missing folder, or a number below 1."""
    checked_name(task.name)
    if task.problems is not None and (not task.problems.is_file() or not task.problems.stat().st_size):
        raise InputError(
            f"{task.problems} holds no problems: write JSON lines of question and answer", field="problems"
        )
    if task.include_path is not None and not task.include_path.is_dir():
        raise InputError(f"{task.include_path} is not a folder of task files", field="include_path")
    for field in ("limit", "batch_size", "max_new_tokens"):
        value = getattr(task, field)
        if value is not None and value < 1:
            raise InputError(f"{field} of task {task.name} is {value}: give 1 or more", field=field)


def check_name(task: EvaluationTask) -> None:
    """Raises InputError for a name that is in no task file of the harness, without making the harness's index.

    Reads the files of the collection until one has the name: a second or two. Imports neither the harness nor torch.
    """
    if task.problems is not None:
        return
    found = find_spec("lm_eval")
    places = [Path(place) / "tasks" for place in (found.submodule_search_locations or ())] if found else []
    if task.include_path is not None:
        places.insert(0, task.include_path)
    wanted = task.name.encode()
    if not any(wanted in path.read_bytes() for path in _task_files(places)):
        raise InputError(f"lm-evaluation-harness has no task {task.name!r}: see `lm-eval ls tasks`", field="task")


def _task_files(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        for folder, _, names in os.walk(place):
            yield from (Path(folder, name) for name in names if name.endswith((".yaml", ".yml", ".py")))


def harness_config(task: EvaluationTask, cache_dir: Path) -> dict[str, Any]:
    """Returns the built-in task's configuration for the harness, which reads `task.problems` through `cache_dir`."""
    config: dict[str, Any] = yaml.safe_load(
        files("weightline.evaluation").joinpath("tasks/arithmetic.yaml").read_text()
    )
    config["task"] = task.name
    config["dataset_kwargs"] = {"data_files": {"test": str(task.problems)}, "cache_dir": str(cache_dir)}
    if task.max_new_tokens is not None:
        config["generation_kwargs"]["max_gen_toks"] = task.max_new_tokens
    return config
