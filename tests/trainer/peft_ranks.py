"""Rank program of test_peft: a stage of weightline with a LoRA on the model."""

from __future__ import annotations

from peft import LoraConfig

from weightline.stages.training import make_trainer, run_stage, start_rank


def main() -> None:
    """Train one stage as its job file says, on this rank."""
    job = start_rank()
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run_stage(make_trainer(job, peft_config=lora), job)


if __name__ == "__main__":
    main()
