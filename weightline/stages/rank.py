"""What accelerate starts on every rank: ties the process to its launcher, then becomes the rank program of the stage.

accelerate launch --config_file infra/accelerate/zero3_cpu.yaml -m weightline.stages.rank --job JOB.json

Imports next to nothing before the process is tied: importing torch and TRL takes many seconds, and a launcher that is
killed meanwhile must not leave its ranks behind either.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Ask the kernel to kill this process when its launcher has gone, even by kill -9. Linux only.

    SIGKILL, not SIGTERM: a rank in a collective waits in C++ code, where no handler of Python's would run.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have gone before the kernel was asked.
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run the stage that the job file names, on this rank."""
    die_with_launcher()
    from weightline.stages.job import StageJob

    job = StageJob.load(Path(sys.argv[sys.argv.index("--job") + 1]))
    importlib.import_module(f"weightline.stages.{job.stage.kind}").main()


if __name__ == "__main__":
    main()
