"""What ChainRollouts uses of TRL's GRPOTrainer: the names, of which many are private, and the settings that it needs.

`tests/stages/test_library_names.py` looks for the same names in the installed TRL.
"""

from __future__ import annotations

import inspect
from typing import Any

from weightline.errors import InputError
from weightline.rollouts.sampling import Sampling
from weightline.trainer.adapter import is_peft_model

#: Attributes of a trainer that is ready to train.
TRAINER_NAMES = (
    "_buffered_inputs", "_generate_single_turn", "_get_num_items_in_batch", "_logs", "_metrics", "_step",
    "_tokenize_prompts", "environment_factories", "eos_token_ids", "get_batch_samples", "loss_type",
    "max_completion_length", "min_p", "num_generations", "num_generations_eval", "num_iterations",
    "repetition_penalty", "reward_func_names", "reward_weights", "rollout_func", "temperature", "tools", "top_k",
    "top_p",
    "use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
)  # fmt: skip
#: Attributes that TRL reads while it generates, and that it sets for its own vLLM client only.
GENERATION_NAMES = ("_last_loaded_step", "vllm_generation.generate", "vllm_generation.sync_weights")


def require_names(trainer: Any) -> None:
    """Raises InputError with the first name that the trainer lacks."""
    for name in TRAINER_NAMES:
        if not hasattr(trainer, name):
            raise _lacking(trainer, name)
    source = inspect.getsource(type(trainer)._generate_single_turn)
    for name in GENERATION_NAMES:
        if f"self.{name}" not in source:
            raise _lacking(trainer, name)


def _lacking(trainer: Any, name: str) -> InputError:
    return InputError(
        f"{type(trainer).__name__} has no `{name}`, which ChainRollouts needs: use GRPOTrainer of a TRL release that "
        "weightline is tested with (constraints.txt)",
        attribute=name,
    )


def require_settings(trainer: Any, lookahead: int) -> None:
    """Raises InputError for settings of the trainer that do not go with rollouts from replicas."""
    mode = trainer.vllm_importance_sampling_mode
    num_local = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    for field, is_wrong, remedy in (
        ("model", is_peft_model(trainer.model), "a whole model, since replicas serve no adapters"),
        ("use_vllm", trainer.use_vllm, "leave it out, since the replicas generate"),
        ("rollout_func", trainer.rollout_func is not None, "pass it to ChainRollouts(rollout=...)"),
        ("generation_kwargs", trainer.args.generation_kwargs, "leave it out, since replicas do not know it"),
        ("vllm_importance_sampling_correction", not trainer.vllm_importance_sampling_correction, "leave it on"),
        ("vllm_importance_sampling_mode", trainer.loss_type == "vespo" and not mode.startswith("token"),
         "token_truncate or token_mask, which the loss vespo needs"),
        ("per_device_train_batch_size", num_local % trainer.num_generations,
         f"times steps_per_generation a multiple of num_generations ({trainer.num_generations}): a rank asks for "
         "whole groups"),
        ("lookahead", lookahead and trainer.environment_factories is not None,
         "0, since an environment of TRL writes its prompts when the batch is needed"),
    ):  # fmt: skip
        if is_wrong:
            raise InputError(f"{field} does not go with rollouts from replicas: {remedy}", field=field)


def sampling_of(trainer: Any, num_generations: int) -> Sampling:
    """Returns how TRL would draw completions itself."""
    return Sampling(
        n=num_generations,
        max_tokens=trainer.max_completion_length,
        temperature=trainer.temperature,
        top_p=trainer.top_p,
        top_k=trainer.top_k or 0,
        min_p=trainer.min_p or 0.0,
        repetition_penalty=trainer.repetition_penalty,
        stop_token_ids=tuple(trainer.eos_token_ids),
    )
