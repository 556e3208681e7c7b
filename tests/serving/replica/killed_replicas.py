"""Replicas that are killed with SIGKILL in the middle of an apply. Run as a program by test_crash.

usage: python -m tests.serving.replica.killed_replicas CHAIN STATE_DIRS KILL_POINT...
For every kill point a child serves version 0, prepares version 1 and is killed at that point of its apply. A point is
`withdrawn`, `written`, `proven`, or the number of a tensor, half of which is written by then.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from weightline.chain import open_chain
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.replica import Replica
from weightline.types import Changes


class KilledEngine(TransformersEngine):
    """Kills its process at the chosen point."""

    def __init__(self, kill_point: str) -> None:
        super().__init__("cpu")
        self.kill_point = kill_point
        self.is_armed = False
        self.num_scatters = 0

    def reach(self, point: str) -> None:
        if self.is_armed and point == self.kill_point:
            os.kill(os.getpid(), signal.SIGKILL)

    def scatter(self, changes: Sequence[Changes]) -> None:
        self.reach("withdrawn")
        super().scatter(changes)
        self.reach("written")

    def scatter_tensor(self, changes: Changes) -> None:
        half = changes.num_changed // 2
        super().scatter_tensor(
            Changes(changes.segment, changes.positions_K[:half], changes.old_K[:half], changes.new_K[:half])
        )
        self.reach(str(self.num_scatters))
        self.num_scatters += 1
        super().scatter_tensor(changes)

    def set_version(self, version: int | None) -> None:
        if version == 1:
            self.reach("proven")
        super().set_version(version)


def serve_until_killed(chain_url: str, state_dir: Path, kill_point: str) -> None:
    engine = KilledEngine(kill_point)
    replica = Replica(open_chain(chain_url), engine, state_dir, "replica-0")
    replica.refresh(0)
    engine.is_armed = True
    replica.refresh(1)


def main() -> int:
    torch.set_num_threads(1)
    chain_url, state_dirs, *kill_points = sys.argv[1:]
    # Once for all children: the first load of a process imports and compiles for seconds.
    Replica(open_chain(chain_url), TransformersEngine("cpu"), Path(state_dirs) / "warm", "warm").refresh(0)
    for kill_point in kill_points:
        child = os.fork()
        if child == 0:
            serve_until_killed(chain_url, Path(state_dirs) / kill_point, kill_point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.stderr.write(f"the child was not killed at {kill_point}: {status}\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
