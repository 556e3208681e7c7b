"""The program that accelerate starts on every rank: ties the process to its launcher, then trains the stage.

accelerate launch --config_file infra/accelerate/zero3_cpu.yaml -m weightline.stages.rank --job JOB.json

It imports only the standard library before the process is tied: importing torch and TRL takes many seconds, and a
launcher that is killed meanwhile must not leave its ranks behind.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Makes the kernel kill this process when its launcher has ended, even by kill -9. Linux only.

    The signal is SIGKILL, since a rank in a collective waits in C++ code, where no Python handler of SIGTERM runs.
    """
    if sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The launcher may have ended before the call.
    if os.getppid() != launcher:
        os.kill(os.getpid(), signal.SIGKILL)


class RankExit:
    """An exit handler that ends the process with status 0 if the work was declared finished.

    About 1 run in 30 died of SIGABRT, `terminate called without an active exception`, in a rank that had saved
    everything. The likely cause (https://github.com/pytorch/pytorch/pull/179291): a worker thread of gloo still holds
    the tensors of the last collective while the interpreter is finalized. Releasing them needs the interpreter's lock;
    a finalizing interpreter then ends the thread, whereupon C++ ends the process. Destroying the process groups does
    not help while DeepSpeed refers to them. So a finished rank exits before finalization, but after the exit handlers
    of modules that it imported later.
    """

    def __init__(self) -> None:
        self._is_finished = False
        # Handlers run in reverse order, so those registered later, as publishing may do, run first.
        atexit.register(self._leave)

    def declare_finished(self) -> None:
        """Declares that all results are on disk and that no failure remains to be reported."""
        self._is_finished = True

    def _leave(self) -> None:
        if self._is_finished:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def main() -> None:
    """Trains the stage that the job file names, on this rank."""
    die_with_launcher()
    # What the libraries make when they are imported stays. To look for garbage in it costs a fifth of the start, and
    # time at every collection of the training.
    gc.disable()
    from weightline.stages import training

    gc.freeze()
    gc.enable()
    training.main()


if __name__ == "__main__":
    main()
