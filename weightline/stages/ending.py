"""How a rank ends: at once, when all its work is on disk.

About 1 run in 30 died of SIGABRT, `terminate called without an active exception`, in a rank that had saved everything.
The likely cause (https://github.com/pytorch/pytorch/pull/179291): a worker thread of gloo still holds the tensors of
the last collective while the interpreter is finalized. Letting go of them needs the interpreter's lock; a finalizing
interpreter answers by ending the thread, and C++ answers that by ending the process. Destroying the process groups
does not help while DeepSpeed refers to them. So a rank that has finished leaves before finalization, but after the
exit handlers of whatever it imported later.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys


class Ending:
    """An exit handler that ends the process with status 0, provided that the work was declared finished."""

    def __init__(self) -> None:
        self._is_finished = False
        # Handlers run in reverse: whatever registers later, as publishing may, still has its turn first.
        atexit.register(self._leave)

    def declare_finished(self) -> None:
        """Everything is on disk, and no failure is to be reported any more."""
        self._is_finished = True

    def _leave(self) -> None:
        if self._is_finished:
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
