"""What training uses of its libraries without their documentation's promise: each test names what is missing."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from weightline.stages.recipe import StageKind
from weightline.stages.trainer_args import trainer_field_names
from weightline.stages.trl_names import GENERATION_NAMES, TRAINER_NAMES

#: Module, what of it, and which of our modules uses it.
_PRIVATE = [
    ("deepspeed.ops", "__compatible_ops__", "weightline.stages.cpu"),
    ("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset", "weightline.trainer.partition"),
    ("torch.distributed.fsdp._common_utils", "_is_fsdp_flattened", "weightline.trainer.partition"),
    ("transformers.trainer", "Trainer._inner_training_loop", "weightline.trainer.seat"),
    ("transformers.trainer_callback", "CallbackHandler.call_event", "weightline.trainer.seat"),
    ("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK", "weightline.stages.trainer_args"),
]
_KINDS: list[StageKind] = ["sft", "dpo", "grpo"]


@pytest.mark.parametrize(("module", "name", "user"), _PRIVATE)
def test_a_private_name_is_there(module: str, name: str, user: str) -> None:
    found: object = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{user} uses {module}.{name}, which the installed release lacks"
        found = getattr(found, part)
    if inspect.isfunction(found):
        assert found.__module__ == module, f"{user} expects {name} in {module}, it is in {found.__module__}"


@pytest.mark.parametrize("kind", _KINDS)
def test_trl_has_the_public_names_of_a_stage(kind: StageKind) -> None:
    trl = importlib.import_module("trl")
    for part in ("Trainer", "Config"):
        name = f"{kind.upper()}{part}"
        assert hasattr(trl, name), f"weightline.stages.training uses trl.{name}, which the installed TRL lacks"


@pytest.mark.parametrize("kind", _KINDS)
def test_the_fields_read_from_trls_source_are_those_of_its_configuration(kind: StageKind) -> None:
    """weightline.stages.trainer_args reads `trl/trainer/KIND_config.py` and `base_config.py` without importing TRL."""
    config = getattr(importlib.import_module("trl"), f"{kind.upper()}Config")
    fields = {field.name for field in dataclasses.fields(config) if field.init}
    missing = fields - trainer_field_names(kind)
    assert not missing, f"the installed TRL has these fields elsewhere: {sorted(missing)}"


@pytest.mark.parametrize("name", ["_buffered_inputs", "_step"])
def test_grpo_keeps_its_generated_batch_under_the_names_that_are_saved(name: str) -> None:
    source = inspect.getsource(importlib.import_module("trl").GRPOTrainer)
    assert f"self.{name} = " in source, f"weightline.stages.rollout_state uses GRPOTrainer.{name}, which TRL lacks"


@pytest.mark.parametrize("name", TRAINER_NAMES)
def test_grpo_has_the_names_that_rollouts_use(name: str) -> None:
    trainer = importlib.import_module("trl").GRPOTrainer
    source = inspect.getsource(trainer)
    assert hasattr(trainer, name) or f"self.{name} = " in source or f"self.{name}: " in source, (
        f"weightline.stages.chain_rollouts uses GRPOTrainer.{name}, which the installed TRL lacks"
    )


@pytest.mark.parametrize("name", GENERATION_NAMES)
def test_grpo_generates_through_the_object_that_rollouts_replace(name: str) -> None:
    source = inspect.getsource(importlib.import_module("trl").GRPOTrainer._generate_single_turn)
    assert f"self.{name}" in source, f"GRPOTrainer of the installed TRL does not generate by self.{name}"
