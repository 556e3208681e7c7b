"""Checks the `trainer_args` of a recipe against TRL and transformers, without importing torch.

`trainer_args` are passed through to SFTConfig, DPOConfig and GRPOConfig. An unknown name should be refused in
milliseconds and before anything starts. `dataclasses.fields` would need to import TRL and torch, which takes ten
seconds; so the fields are read from the source, and tests compare both.
"""

from __future__ import annotations

import ast
import difflib
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from weightline.errors import InputError
from weightline.stages.load import recipe_error
from weightline.stages.recipe import StageConfig, StageKind

#: Fields that the stage sets itself, and the setting of a recipe that replaces each.
OWNED_ARGS: dict[str, str] = {
    "output_dir": "the run's folder",
    "max_steps": "stages[].max_steps",
    "num_train_epochs": "stages[].max_steps",
    "learning_rate": "stages[].learning_rate",
    "per_device_train_batch_size": "stages[].per_device_batch_size",
    "save_steps": "stages[].save_steps",
    "save_strategy": "stages[].save_steps",
    "save_only_model": "always false, or a stage could not resume",
    "seed": "seed",
    "data_seed": "seed",
    "use_cpu": "device",
    "bf16": "dtype",
    "fp16": "dtype",
    "deepspeed": "infra/accelerate",
    "resume_from_checkpoint": "the run decides",
}


#: Reporters of transformers, and the packages of which each needs one. Kubeflow needs none, since it configures its
#: training pods by an environment variable.
REPORTERS: dict[str, tuple[str, ...]] = {
    "trackio": ("trackio",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "azure_ml": ("azureml",),
    "comet_ml": ("comet_ml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
}
_KUBEFLOW_VARIABLE = "KUBEFLOW_TRAINER_SERVER_URL"


def check_trainer_args(stage: StageConfig, field: str) -> None:
    """Raises RecipeError for an argument that the stage owns, that TRL lacks, or that names a missing reporter."""
    known = trainer_field_names(stage.kind)
    for name in stage.trainer_args:
        if name in OWNED_ARGS:
            raise recipe_error(f"{field}.{name}", "this is set by the stage", f"use instead: {OWNED_ARGS[name]}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else "remove it"
            raise recipe_error(f"{field}.{name}", f"{stage.kind.upper()}Config of TRL has no such field", remedy)
    _check_reporters(stage.trainer_args.get("report_to", []), f"{field}.report_to")


def _check_reporters(report_to: object, field: str) -> None:
    """Raises RecipeError for a reporter without its package, which would end the ranks after a minute of loading."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise recipe_error(field, f"{report_to!r} does not name a reporter", f"some of {', '.join(REPORTERS)}")
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in REPORTERS:
            close = difflib.get_close_matches(name, REPORTERS, n=1)
            remedy = f"did you mean `{close[0]}`?" if close else f"some of {', '.join(REPORTERS)}"
            raise recipe_error(field, f"there is no reporter {name!r}", remedy)
        if name == "kubeflow" and _KUBEFLOW_VARIABLE not in os.environ:
            raise recipe_error(field, "kubeflow reports from the pods of its own trainer", f"set {_KUBEFLOW_VARIABLE}")
        if REPORTERS[name] and not any(find_spec(module) for module in REPORTERS[name]):
            package = REPORTERS[name][0]
            raise recipe_error(field, f"{name} needs the package {package}", f"pip install {package}")


@cache
def trainer_field_names(kind: StageKind) -> frozenset[str]:
    """Returns every field of the stage's TRL configuration, with inherited ones. InputError without TRL."""
    sources = [
        _package_folder("trl") / "trainer" / f"{kind}_config.py",
        _package_folder("trl") / "trainer" / "base_config.py",
        _package_folder("transformers") / "training_args.py",
    ]
    return frozenset(name for source in sources for name in _annotated_fields(source))


def _package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package} is not installed: pip install 'weightline[train]'", package=package)
    return Path(spec.submodule_search_locations[0])


def _annotated_fields(source: Path) -> list[str]:
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return [
        statement.target.id
        for node in classes
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    ]
