"""Runs a command until it ends or a given process has ended, whichever comes first.

python -m weightline.launch.tether PID COMMAND [ARGUMENT...]

Use it for a command that must outlive the process that starts it, but not a third process. The kernel can signal a
process only when its parent ends (`start_process`).
"""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import NoReturn

import psutil

from weightline.launch.processes import ProcessId, ProcessTree, start_process

_LOOK_SECONDS = 0.5


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit code; 0 when it was ended because the process of the pid ended."""
    signal.signal(signal.SIGTERM, _exit)
    try:
        owner = ProcessId.of(int(argv[0]))
    except psutil.NoSuchProcess:
        return 0
    child = start_process(argv[1:])
    tree = ProcessTree(child.pid)
    try:
        while owner.is_alive():
            try:
                return child.wait(_LOOK_SECONDS)
            except subprocess.TimeoutExpired:
                tree.observe()
        return 0
    finally:
        tree.end()


def _exit(*_: object) -> NoReturn:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
