"""How a rank ends: at once when it has finished, as any program when it has not."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import atexit, sys, threading
from weightline.stages.rank import RankExit
class Finalized:
    def __del__(self): print("finalized")
kept = Finalized()
atexit.register(print, "registered before")
ending = RankExit()
atexit.register(print, "registered after")
sys.stdout.write("buffered ")
{rest}
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("rest", "returncode", "output"),
    [
        ("ending.declare_finished()", 0, "buffered registered after\n"),
        ("", 0, "buffered registered after\nregistered before\nfinalized\n"),
        ("sys.exit(3)", 3, "buffered registered after\nregistered before\nfinalized\n"),
    ],
)
def test_only_a_finished_rank_skips_finalization(rest: str, returncode: int, output: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(rest=rest)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (returncode, output)
