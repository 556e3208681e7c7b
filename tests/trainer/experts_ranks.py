"""Rank program of test_experts: a mixture under ZeRO-3 in transformers' Trainer. Run by accelerate launch."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed.ops
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from weightline.trainer.callback import WeightlineCallback


def main(chain_url: str, folder: Path) -> None:
    """Two optimizer steps, each a version, and the weights of the end."""
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    arguments = TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, bf16=True,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    rows = [{"input_ids": [row + token for token in range(8)]} for row in range(16)]
    trainer = Trainer(model, arguments, train_dataset=[row | {"labels": row["input_ids"]} for row in rows])
    trainer.add_callback(WeightlineCallback(chain_url))
    trainer.train()
    trainer.save_model(str(folder / "end"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
