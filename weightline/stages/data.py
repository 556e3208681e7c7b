"""Loads the dataset of a stage for TRL: the built-in arithmetic, a local file or folder, or a Hub dataset."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from weightline.files import user_path
from weightline.stages import arithmetic
from weightline.stages.job import StageJob
from weightline.stages.load import recipe_error
from weightline.stages.preflight import is_local_path

_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_EXAMPLES = {
    "sft": arithmetic.supervised_examples,
    "dpo": arithmetic.preference_examples,
    "grpo": arithmetic.prompt_examples,
}
_IGNORED_LABEL = -100


def load_stage_dataset(job: StageJob, tokenizer: Any) -> Dataset:
    """Returns the training examples of a stage. The same job gives the same examples in the same order.

    RecipeError for a dataset that is empty or cannot be loaded.
    """
    config = job.stage.dataset
    if config.is_arithmetic:
        num_examples = config.num_examples or 10_000
        examples = _EXAMPLES[job.stage.kind](job.arithmetic, num_examples, job.seed)
        return tokenize_pairs(examples, tokenizer) if job.stage.kind == "sft" else Dataset.from_list(examples)
    field = f"stages[{job.stage.kind}].dataset"
    try:
        dataset = _load(config.path, config.name, config.split)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise recipe_error(field, f"{config.path} cannot be loaded: {error}", "correct path, name or split") from error
    if len(dataset) == 0:
        raise recipe_error(field, f"{config.path} is empty", "give a dataset with at least one example")
    return dataset.select(range(min(config.num_examples or len(dataset), len(dataset))))


def tokenize_pairs(examples: list[dict[str, str]], tokenizer: Any) -> Dataset:
    """Returns the examples as input_ids and labels, where only completions have labels.

    SFTTrainer would tokenize one example at a time, on one rank after the other: minutes for tens of thousands.
    """
    prompts = tokenizer([example["prompt"] for example in examples])["input_ids"]
    completions = tokenizer([example["completion"] + tokenizer.eos_token for example in examples])["input_ids"]
    pairs = list(zip(prompts, completions, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + completion for prompt, completion in pairs],
            "labels": [[_IGNORED_LABEL] * len(prompt) + completion for prompt, completion in pairs],
        }
    )


def load_reward(job: StageJob) -> Callable[..., list[float]]:
    """Returns the reward function of a GRPO stage. RecipeError when it cannot be imported."""
    if job.stage.reward is None:
        return arithmetic.exact_match_reward
    module, _, name = job.stage.reward.partition(":")
    try:
        reward: Callable[..., list[float]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        problem = f"{job.stage.reward} cannot be imported: {error}"
        raise recipe_error("stages[grpo].reward", problem, "install it where the ranks run") from error
    return reward


def _load(path: str, name: str | None, split: str) -> Dataset:
    if not is_local_path(path):
        return load_dataset(path, name, split=split)
    local = user_path(path)
    if local.is_dir():
        return load_dataset(str(local), name, split=split)
    options: dict[str, Any] = {"data_files": {split: str(local)}, "split": split}
    return load_dataset(_BUILDERS.get(local.suffix, "json"), **options)
