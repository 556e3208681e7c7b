"""Runs lm-evaluation-harness on a checkpoint folder, in this process. Importing this imports torch and the harness.

It calls `lm_eval.evaluate` instead of `simple_evaluate`, which also starts several processes to describe the machine,
and so takes longer than a small evaluation.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from weightline.errors import InputError
from weightline.evaluation.task import EvaluationTask, harness_config

_SEED = 1234


@dataclass(frozen=True, slots=True)
class Scores:
    """Results of the harness. `metrics` have its own names (`exact_match,none`); `score` is the task's first one."""

    score: float
    metrics: dict[str, float]
    num_problems: int


def run_harness(folder: Path, task: EvaluationTask, cache_dir: Path, device: str | None = None) -> Scores:
    """Evaluates the model in `folder`. The same model and task give the same scores. Writes below `cache_dir` only.

    InputError for a task that the harness does not have. The built-in task uses no network.
    """
    with _quiet():
        manager = _manager_of(task)
        loaded = manager.load([task.name if task.problems is None else harness_config(task, cache_dir)])
        for one in loaded["tasks"].values():
            _fix_fewshot(one)
        with torch.random.fork_rng():
            torch.manual_seed(_SEED)
            model = _load(folder, task, device)
            results = lm_eval.evaluate(
                lm=model, task_dict=loaded, limit=task.limit, bootstrap_iters=0, log_samples=False
            )
    return _scores(results, task.name, loaded["tasks"].get(task.name))


class _QuietModel(HFLM):
    """A model without progress bars, since several evaluations per minute share a log with the pipeline."""

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)


def _load(folder: Path, task: EvaluationTask, device: str | None) -> HFLM:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).to(chosen).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _QuietModel(pretrained=model, tokenizer=tokenizer, batch_size=task.batch_size)


def _manager_of(task: EvaluationTask) -> TaskManager:
    """Returns a manager that has the task. InputError when none has.

    The index of the harness's own thousands of tasks takes seconds, so it is made only when needed.
    """
    own = _task_manager(task.include_path, False)
    if task.problems is not None or task.name in own.all_tasks:
        return own
    everything = _task_manager(task.include_path, True)
    if task.name not in everything.all_tasks:
        raise InputError(f"lm-evaluation-harness has no task {task.name!r}: see `lm-eval ls tasks`", field="task")
    return everything


@functools.lru_cache(maxsize=4)
def _task_manager(include_path: Path | None, include_defaults: bool) -> TaskManager:
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _fix_fewshot(task: Any) -> None:
    """Sets few-shot examples as `simple_evaluate` does: none by default, and the same ones in every run."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEED)


def _scores(results: Any, name: str, task: Any) -> Scores:
    """Returns the scores. The main one is the metric that the task's file lists first, or the only one of a group."""
    values = results["results"][name]
    metrics = {key: float(value) for key, value in values.items() if "," in key and isinstance(value, int | float)}
    listed = (task.get_config("metric_list") or []) if task is not None else []
    first = listed[0]["metric"] if listed else None
    scores = [key for key in metrics if (key.split(",")[0] == first if first else "_stderr," not in key)]
    if not scores:
        raise InputError(f"task {name} has no metric of its own: name one of its subtasks", field="task")
    counts = results["n-samples"].values()
    return Scores(metrics[scores[0]], metrics, sum(int(count["effective"]) for count in counts))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Limits the log of the harness to errors and turns off progress bars, for the block only."""
    logger = logging.getLogger("lm_eval")
    level, had_bars = logger.level, transformers_logging.is_progress_bar_enabled()
    had_datasets_bars = not datasets.are_progress_bars_disabled()
    # Building a task's requests shows a bar that no argument turns off.
    bar_of_requests = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = functools.partial(bar_of_requests, disable=True)
    logger.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar_of_requests
        logger.setLevel(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if had_datasets_bars:
            datasets.enable_progress_bars()
