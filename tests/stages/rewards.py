"""Rewards that an untrained model earns unequally, so that a few GRPO steps move the weights."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import TrainerState

#: Names the folder through which a test holds a training.
HOLDS = "TEST_HOLDS"
#: Names the folder to which prompts and completions are written.
NOTES = "TEST_NOTES"


def share_of_even_bytes(completions: list[str], **_: Any) -> list[float]:
    return [sum(byte % 2 == 0 for byte in text.encode()) / 8 for text in completions]


def noted_share_of_even_bytes(
    prompts: list[str], completions: list[str], trainer_state: TrainerState, **_: Any
) -> list[float]:
    """Writes the prompts and completions of each rank and step to a file, the newest ones of a step if it is redone."""
    rewards = share_of_even_bytes(completions)
    name = f"rank-{os.environ['RANK']}-step-{trainer_state.global_step}.json"
    (Path(os.environ[NOTES]) / name).write_text(json.dumps([prompts, completions, rewards]))
    return rewards


def held_share_of_even_bytes(completions: list[str], trainer_state: TrainerState, **_: Any) -> list[float]:
    """Training waits after step N, and says so by a file `at-N`, while there is a file `hold-N`."""
    folder, step = Path(os.environ[HOLDS]), trainer_state.global_step
    while (folder / f"hold-{step}").exists():
        (folder / f"at-{step}").touch()
        time.sleep(0.05)
    return share_of_even_bytes(completions)
