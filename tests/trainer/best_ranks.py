"""Rank program of test_endings: a trainer on two ranks that loads its best checkpoint at the end. Run by torchrun."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.trainer.small import Worsening, small_trainer
from weightline.trainer.callback import WeightlineCallback


def main(chain_url: str, folder: str) -> None:
    """Four steps, each evaluated, saved and a version, of which the first is the best. Rank 0 saves the end."""
    torch.set_num_threads(1)
    trainer = small_trainer(
        Path(folder), WeightlineCallback(chain_url, run_id="mine"), kind=Worsening, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint == f"{folder}/out/checkpoint-1"
    trainer.save_model(f"{folder}/end")
    trainer.accelerator.end_training()
