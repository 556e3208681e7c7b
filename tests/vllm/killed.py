"""Replicas on a real vLLM that are killed with SIGKILL in an apply, and come back. Run as a program by test_crash.

usage: python -m tests.vllm.killed WORK CHAIN KILL_POINT...
For every kill point a forked child serves version 0, prepares version 1 and is killed at that point: `staged`,
`withdrawn`, `written`, `proven`, or the number of a box, half of whose elements are written by then. Then a new
replica on each state folder recovers and moves on. Prints one JSON line a kill point.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from tests.vllm.parts import FolderChain, greedy_tokens, offline
from weightline.chain import open_chain
from weightline.serving.engines.vllm import memory
from weightline.serving.engines.vllm.driver import VllmEngine
from weightline.serving.replica.replica import Replica, prove_weights
from weightline.serving.replica.status import read_mark


class Killer:
    """Kills its process at the chosen point of an apply, once armed."""

    def __init__(self, engine: VllmEngine, kill_point: str) -> None:
        self._engine, self._kill_point, self._num_boxes = engine, kill_point, 0
        self._write_box = memory.write_box

    def arm(self) -> None:
        write_staged, set_version, pause = self._engine.write_staged, self._engine.set_version, self._engine.pause

        def watched_write_staged() -> None:
            self.reach("withdrawn")
            write_staged()
            self.reach("written")

        def watched_set_version(version: int | None) -> None:
            if version == 1:
                self.reach("proven")
            set_version(version)

        def watched_pause(timeout_seconds: float) -> None:
            self.reach("staged")
            pause(timeout_seconds)

        self._engine.write_staged = watched_write_staged  # type: ignore[method-assign]
        self._engine.set_version = watched_set_version  # type: ignore[method-assign]
        self._engine.pause = watched_pause  # type: ignore[method-assign]
        memory.write_box = self.write_half_and_reach

    def reach(self, point: str) -> None:
        if point == self._kill_point:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_half_and_reach(self, one: memory.BoxChanges, *, is_undo: bool) -> bool:
        half = one.at_K.numel() // 2
        one.flat[one.at_K[:half]] = one.new_K[:half]
        self.reach(str(self._num_boxes))
        self._num_boxes += 1
        return self._write_box(one, is_undo=is_undo)


def main() -> int:
    work, chain_url, *kill_points = sys.argv[1:]
    made = FolderChain(open_chain(chain_url), Path(work))
    with offline(made) as (engine, llm):
        for kill_point in kill_points:
            child = os.fork()
            if child == 0:
                _serve_until_killed(made, engine, kill_point)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.stderr.write(f"the child was not killed at {kill_point}: {status}\n")
                return 1
        for kill_point in kill_points:
            print(json.dumps(_recover(made, engine, llm, kill_point)), flush=True)
    return 0


def _serve_until_killed(made: FolderChain, engine: VllmEngine, kill_point: str) -> None:
    replica = Replica(made.chain, engine, made.work / kill_point, "replica-0")
    replica.refresh(0)
    Killer(engine, kill_point).arm()
    replica.refresh(1)


def _recover(made: FolderChain, engine: VllmEngine, llm: Any, kill_point: str) -> dict[str, Any]:
    state_dir = made.work / kill_point
    left = read_mark(state_dir)
    assert left is not None
    replica = Replica(made.chain, engine, state_dir, "replica-0")
    facts = replica.recover()
    assert facts is not None
    prove_weights(engine, made.chain, facts.version)
    recovered = greedy_tokens(llm)
    replica.refresh(1)
    prove_weights(engine, made.chain, 1)
    return {
        "kill_point": kill_point, "mark": left.model_dump(), "version": facts.version, "tokens": recovered,
        "later": greedy_tokens(llm),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
