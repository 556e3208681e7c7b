"""Rank program: direct preference optimization, the chosen over the rejected (https://arxiv.org/abs/2305.18290).

Started by weightline.stages.rank.
"""

from __future__ import annotations

from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from weightline.stages.common import run_stage, start_rank, training_args
from weightline.stages.data import load_stage_dataset


def main() -> None:
    """Train one stage as its job file says, on this rank."""
    job = start_rank()
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    trainer = DPOTrainer(
        model=str(job.model_dir),
        args=training_args(DPOConfig, job),
        train_dataset=load_stage_dataset(job, tokenizer),
        processing_class=tokenizer,
    )
    run_stage(trainer, job)
