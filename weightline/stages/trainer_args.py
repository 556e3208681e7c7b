"""Which fields TRL's configurations have, read from their source without importing torch.

`trainer_args` of a recipe are passed through to SFTConfig, DPOConfig and GRPOConfig. A wrong name should be refused
in milliseconds and before anything starts; importing TRL for that takes ten seconds and torch.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from weightline.errors import InputError
from weightline.stages.recipe import StageKind

#: Fields that the stage sets itself, and where a recipe says them instead.
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
    "bf16": "always true",
    "fp16": "bf16, always true",
    "deepspeed": "infra/accelerate",
    "resume_from_checkpoint": "the run decides",
}


@cache
def trainer_field_names(kind: StageKind) -> frozenset[str]:
    """Every field of the stage's TRL configuration, inherited ones included. Raises InputError without TRL."""
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
