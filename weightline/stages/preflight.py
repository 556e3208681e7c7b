"""Cheap checks of a recipe against this machine, before anything is trained or written. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.errors import InputError, LaunchError, NotFoundError
from weightline.files import user_path
from weightline.stages.generation import check_generation_batch, check_rollouts
from weightline.stages.load import recipe_error
from weightline.stages.recipe import DatasetConfig, ModelConfig, Recipe
from weightline.stages.trainer_args import check_trainer_args

#: Columns that TRL reads, by kind of stage. A dataset must have one of these sets.
REQUIRED_COLUMNS: dict[str, tuple[frozenset[str], ...]] = {
    "sft": (frozenset({"prompt", "completion"}), frozenset({"text"}), frozenset({"messages"})),
    "dpo": (frozenset({"chosen", "rejected"}),),
    "grpo": (frozenset({"prompt"}),),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_DATA_SUFFIXES = frozenset({".jsonl", ".json", ".parquet", ".csv"})


@dataclass(frozen=True, slots=True)
class Placement:
    """The device of a run's ranks, and their number."""

    device: Literal["cpu", "cuda"]
    num_processes: int


def check_recipe(recipe: Recipe, num_cuda_devices: int | None = None) -> Placement:
    """Checks whether this machine can run the recipe, and returns the placement of its ranks.

    RecipeError names field and remedy. Reads a few files. Starts no process, except for one short one that counts GPUs
    if there is a GPU driver and `num_cuda_devices` is None. Safe to repeat.
    """
    _check_model(recipe.model)
    for index, stage in enumerate(recipe.stages):
        check_trainer_args(stage, f"stages[{index}].trainer_args")
        _check_dataset(stage.dataset, stage.kind, f"stages[{index}].dataset")
    include_path = recipe.evaluation.include_path
    if include_path is not None and not user_path(include_path).is_dir():
        raise recipe_error("evaluation.include_path", f"no folder {include_path}", "give a folder of task YAML files")
    placement = plan_placement(recipe, count_cuda_devices() if num_cuda_devices is None else num_cuda_devices)
    for index, stage in enumerate(recipe.stages):
        check_generation_batch(stage, placement.num_processes, f"stages[{index}]")
        check_rollouts(stage, placement.num_processes, recipe.num_machines, f"stages[{index}]")
    return placement


def plan_placement(recipe: Recipe, num_cuda_devices: int, num_cores: int | None = None) -> Placement:
    """Chooses the device and the number of ranks. Other machines are assumed to equal this one.

    RecipeError for more ranks than can be started, and for ranks that do not spread evenly over the machines.
    """
    wanted, machines = recipe.num_processes, recipe.num_machines
    if wanted is not None and wanted % machines:
        problem = f"{wanted} ranks do not spread evenly over {machines} machines"
        raise recipe_error("num_processes", problem, f"a multiple of {machines}")
    here = None if wanted is None else wanted // machines
    if recipe.device == "cuda" and num_cuda_devices < (here or 1):
        problem = f"{here or 1} ranks per machine need as many GPUs, {num_cuda_devices} are visible"
        raise recipe_error("num_processes", problem, "lower it, make more GPUs visible, or set `device: cpu`")
    if recipe.device != "cpu" and num_cuda_devices >= (here or 1):
        return Placement("cuda", wanted or num_cuda_devices * machines)
    limit = max_cpu_ranks(num_cores or len(os.sched_getaffinity(0)))
    if (here or 2) > limit:
        raise recipe_error("num_processes", f"{here} ranks, but this machine can start {limit}", f"at most {limit}")
    return Placement("cpu", wanted or 2 * machines)


def max_cpu_ranks(num_cores: int) -> int:
    """Returns the bound of ranks: two per core, and at least two. More would slow down every collective."""
    return max(2, 2 * num_cores)


def count_cuda_devices() -> int:
    """Returns the number of GPUs that torch can use, 0 without a driver. Starts a short process that imports torch."""
    if not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia/version")):
        return 0
    argv = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        tail = done.stderr[-2000:]
        raise LaunchError(f"torch cannot be imported: {tail}", argv=argv, returncode=done.returncode, tail=tail)
    return int(done.stdout.split()[-1])


def is_local_path(path: str) -> bool:
    """Returns whether a recipe's `path` is a path on this machine rather than a Hub id."""
    return path.startswith(("/", ".", "~")) or Path(path).exists() or not _HUB_ID.fullmatch(path)


def _check_model(model: ModelConfig) -> None:
    if model.chain is not None:
        _check_start_version(model.chain, model.version)
    if model.path is None or not is_local_path(model.path):
        return
    folder = user_path(model.path)
    if not folder.is_dir():
        remedy = "give an existing folder, a Hub id such as Qwen/Qwen3-0.6B, or `model.tiny`"
        raise recipe_error("model.path", f"no folder {folder}", remedy)
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "weights"), ("tokenizer*", "tokenizer")):
        if not any(folder.glob(pattern)):
            remedy = "save model and tokenizer there with save_pretrained"
            raise recipe_error("model.path", f"{folder} has no {what} ({pattern})", remedy)


def _check_start_version(chain_url: str, version: str) -> None:
    try:
        chain = open_chain(chain_url)
        manifest = chain.header(resolve(chain, version))
    except (InputError, NotFoundError) as error:
        remedy = "give the URL of a chain and a version that it has (weightline log URL)"
        raise recipe_error("model.chain", f"{chain_url} has no version {version}: {error}", remedy) from error
    if manifest.base_model is not None:
        remedy = "merge the adapter into its base model, and give that folder as `path`"
        raise recipe_error("model.chain", f"{chain_url} holds an adapter, not a model", remedy)


def _check_dataset(dataset: DatasetConfig, kind: str, field: str) -> None:
    if dataset.is_arithmetic or not is_local_path(dataset.path):
        return
    path = user_path(dataset.path)
    if not path.exists():
        remedy = "give an existing path, a Hub id or `arithmetic`"
        raise recipe_error(f"{field}.path", f"no file or folder {path}", remedy)
    files = sorted(file for file in path.rglob("*") if file.suffix in _DATA_SUFFIXES) if path.is_dir() else [path]
    if not any(file.stat().st_size for file in files):
        raise recipe_error(f"{field}.path", f"{path} is empty", "give a dataset with at least one example")
    for file in files:
        if file.suffix == ".jsonl":
            _check_first_line(file, kind, field)


def _check_first_line(file: Path, kind: str, field: str) -> None:
    with file.open(encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise recipe_error(f"{field}.path", f"{file} is empty", "give a dataset with at least one example")
    try:
        columns = set(json.loads(first))
    except (ValueError, TypeError) as error:
        problem = f"the first line of {file} is not a JSON object: {error}"
        raise recipe_error(f"{field}.path", problem, "write one JSON object per line") from error
    if not any(required <= columns for required in REQUIRED_COLUMNS[kind]):
        wanted = " or ".join("+".join(sorted(required)) for required in REQUIRED_COLUMNS[kind])
        raise recipe_error(f"{field}.path", f"{file} has columns {sorted(columns)}", f"{kind} needs {wanted}")
