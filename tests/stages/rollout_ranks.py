"""The rank program of a GRPO stage that counts how often ZeRO-3 gathers parameters, and may be killed."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import deepspeed
from transformers import TrainerCallback, TrainerState

from weightline.stages.training import make_trainer, run_stage, start_rank

#: Names the step at whose end rank 1 is killed, once: the variable is taken out for the next process.
KILL = "TEST_KILL_AT_STEP"


class _Watch(TrainerCallback):
    """Notes the number of gathers after each step."""

    def __init__(self) -> None:
        self.num_gathers = 0
        self.after_step: list[int] = []
        init = deepspeed.zero.GatheredParameters.__init__

        def counted(context: Any, *args: Any, **kwargs: Any) -> None:
            self.num_gathers += 1
            init(context, *args, **kwargs)

        deepspeed.zero.GatheredParameters.__init__ = counted

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.after_step.append(self.num_gathers)
        if str(state.global_step) == os.environ.get(KILL) and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    watch = _Watch()
    job = start_rank()
    trainer = make_trainer(job)
    trainer.add_callback(watch)
    run_stage(trainer, job)
    (job.output_dir / f"gathers-{trainer.args.process_index}.json").write_text(json.dumps(watch.after_step))
