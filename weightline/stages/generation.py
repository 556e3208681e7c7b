"""The generation batches of a GRPO stage, and what rollouts need of them. Imports no torch.

TRL generates the completions of `steps_per_generation` micro-steps at once, and trains on them `num_iterations` times.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from weightline.extras import check_installed
from weightline.stages.load import recipe_error
from weightline.stages.recipe import RolloutsConfig, StageConfig

#: Fields of GRPOConfig that rollouts replace, or that no replica follows, and the values that they may have.
_FIXED: dict[str, tuple[object, str]] = {
    "use_vllm": (False, "leave it out: the replicas generate"),
    "use_transformers_continuous_batching": (False, "leave it out: the replicas generate"),
    "vllm_importance_sampling_correction": (True, "leave it out: rollouts need the correction"),
    "generation_kwargs": (None, "leave it out: replicas draw by temperature, top_p, top_k, min_p, repetition_penalty"),
}


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """The sizes of the generation batches of one stage."""

    num_generations: int
    """Completions of one prompt."""
    num_completions: int
    """Completions of one rank and generation batch."""
    optimizer_steps: Fraction
    """Optimizer steps that one generation batch is used for."""

    @classmethod
    def of(cls, stage: StageConfig, num_processes: int) -> GenerationPlan:
        """Returns the plan by TRL's rules for its arguments."""
        given = stage.trainer_args
        accumulation = given.get("gradient_accumulation_steps", 1)
        steps = given.get("steps_per_generation", accumulation)
        if "generation_batch_size" in given:
            steps = max(1, given["generation_batch_size"] // (stage.per_device_batch_size * num_processes))
        return cls(
            num_generations=given.get("num_generations", 8),
            num_completions=stage.per_device_batch_size * steps,
            optimizer_steps=Fraction(steps * given.get("num_iterations", 1), accumulation),
        )


def check_generation_batch(stage: StageConfig, num_processes: int, field: str) -> None:
    """Raises RecipeError for a GRPO stage whose batches are not filled by whole groups."""
    if stage.kind != "grpo":
        return
    plan = GenerationPlan.of(stage, num_processes)
    num_completions, holders = plan.num_completions * num_processes, "batch"
    if stage.rollouts is not None:
        num_completions, holders = plan.num_completions, "rank, which asks for whole groups,"
    if num_completions % plan.num_generations:
        problem = f"{num_completions} completions per {holders} are not a multiple of num_generations"
        remedy = f"a multiple of {plan.num_generations}"
        raise recipe_error(f"{field}.per_device_batch_size", f"{problem} {plan.num_generations}", remedy)


def check_rollouts(stage: StageConfig, num_processes: int, num_machines: int, field: str) -> None:
    """Raises RecipeError for settings of a stage that its rollouts cannot go with."""
    rollouts = stage.rollouts
    if rollouts is None:
        return
    for name, (allowed, remedy) in _FIXED.items():
        if stage.trainer_args.get(name, allowed) != allowed:
            raise recipe_error(f"{field}.trainer_args.{name}", "this does not go with `rollouts`", remedy)
    _check_staleness(rollouts, stage.sync_steps, GenerationPlan.of(stage, num_processes), field)
    if rollouts.replicas == "local":
        if num_machines > 1:
            problem = "the ranks of other machines cannot reach a replica on this one"
            raise recipe_error(f"{field}.rollouts.replicas", problem, "`follow`, with replicas that all ranks reach")
        check_installed("serve")


def _check_staleness(rollouts: RolloutsConfig, sync_steps: int, plan: GenerationPlan, field: str) -> None:
    if rollouts.staleness == 0 and sync_steps > 1:
        problem = f"with {sync_steps} optimizer steps a version, training moves away from its newest version"
        raise recipe_error(f"{field}.rollouts.staleness", f"0 is not kept: {problem}", "`sync_steps: 1`, or at least 1")
    needed = ceil(rollouts.lookahead * plan.optimizer_steps / sync_steps)
    if rollouts.staleness < needed:
        problem = (
            f"{rollouts.staleness} leaves nothing to lookahead {rollouts.lookahead}, after which a batch is {needed} "
            "versions old"
        )
        remedy = f"at least {needed}, better {needed + 1}, or `lookahead: 0`"
        raise recipe_error(f"{field}.rollouts.staleness", problem, remedy)
