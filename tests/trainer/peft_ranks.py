"""Rank program of test_peft: weightline.stages.sft with a LoRA on the model. Run by accelerate launch."""

from __future__ import annotations

from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from weightline.stages.common import run_stage, start_rank, training_args
from weightline.stages.data import load_stage_dataset


def main() -> None:
    """Train one stage as its job file says, on this rank."""
    job = start_rank()
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    trainer = SFTTrainer(
        model=str(job.model_dir),
        args=training_args(SFTConfig, job),
        train_dataset=load_stage_dataset(job, tokenizer),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    run_stage(trainer, job)


if __name__ == "__main__":
    main()
