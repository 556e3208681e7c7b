"""The rank program of a stage whose rank 1 is killed, as by kill -9, at the end of an optimizer step."""

from __future__ import annotations

import os
import signal
from typing import Any

from transformers import TrainerCallback, TrainerState

from weightline.stages.training import make_trainer, run_stage, start_rank

KILLED_AT_STEP = 7


class _Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AT_STEP and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    job = start_rank()
    trainer = make_trainer(job)
    trainer.add_callback(_Killed())
    run_stage(trainer, job)
