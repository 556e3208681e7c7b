"""Rank program: group relative policy optimization, a reward on own samples (https://arxiv.org/abs/2402.03300).

Started by weightline.stages.rank.
"""

from __future__ import annotations

from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from weightline.stages.common import run_stage, start_rank, training_args
from weightline.stages.data import load_reward, load_stage_dataset


def main() -> None:
    """Train one stage as its job file says, on this rank."""
    job = start_rank()
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    trainer = GRPOTrainer(
        model=str(job.model_dir),
        args=training_args(GRPOConfig, job),
        train_dataset=load_stage_dataset(job, tokenizer),
        processing_class=tokenizer,
        reward_funcs=load_reward(job),
    )
    run_stage(trainer, job)
