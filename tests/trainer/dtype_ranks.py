"""Rank program of test_dtype: TRL's SFT with its defaults, and the one line that publishes it. Run by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from weightline import WeightlineCallback


def main(chain_url: str, folder: Path, options: dict[str, Any] | None = None) -> None:
    """Four optimizer steps, each a version, and what `save_model` writes at the end. `options` are of the callback."""
    torch.set_num_threads(1)
    options = dict(options or {})
    resumes_from = options.pop("resumes_from", None)
    arguments = SFTConfig(
        output_dir=str(folder / "out"), max_steps=4, learning_rate=1e-5, per_device_train_batch_size=2, save_steps=2,
        report_to=[], use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"text": f"{number}+{number}={2 * number}, and so on"} for number in range(16)])
    trainer = SFTTrainer(str(folder / "model"), args=arguments, train_dataset=rows)
    trainer.add_callback(WeightlineCallback(chain_url, run_id="mine", **options))
    trainer.train(resume_from_checkpoint=resumes_from)
    trainer.save_model(str(folder / "end"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
