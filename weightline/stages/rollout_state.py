"""Saves in each checkpoint what GRPOTrainer keeps in memory only: the generated batch in use, and the place in it.

With steps_per_generation * num_iterations above gradient_accumulation_steps, one generated batch serves several
optimizer steps. TRL keeps it in `_buffered_inputs`, and the number of micro-steps in `_step`. Without both, a training
that resumes in the middle of a batch would generate another one, with other weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GenerationStateCallback(TrainerCallback):
    """Saves the generated batch of each rank beside the rank's other files, and restores it when training resumes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self._trainer
        is_in_use = trainer._step % micro_steps_of_batch(trainer) != 0
        batches = trainer._buffered_inputs if is_in_use else None
        torch.save({"step": trainer._step, "batches": batches}, _path(args, state))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = _path(args, state)
        if state.global_step > 0 and path.exists():
            saved = torch.load(path, map_location=args.device.type, weights_only=True)
            self._trainer._step, self._trainer._buffered_inputs = saved["step"], saved["batches"]


def micro_steps_of_batch(trainer: Any) -> int:
    """Returns for how many micro-steps a generated batch is used."""
    return int(trainer.args.steps_per_generation * trainer.num_iterations)


def _path(args: TrainingArguments, state: TrainerState) -> Path:
    folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
    return folder / f"generation-{args.process_index}-of-{args.world_size}.pt"
