"""Many chains at once: one that hangs is told as such, and keeps no other waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.chains import commit_state, random_state
from weightline.chain import Chain
from weightline.dashboard import board as board_module
from weightline.dashboard.board import Board
from weightline.dashboard.buckets import FoundChains
from weightline.store.base import ObjectInfo
from weightline.store.memory import MemoryStore


class _HangingStore(MemoryStore):
    """Says nothing until it is let go."""

    def __init__(self, url: str, let_go: threading.Event) -> None:
        super().__init__(url)
        self._let_go = let_go

    def get(self, key: str, *limit: int) -> bytes:
        self._let_go.wait(60)
        return super().get(key, *limit)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        self._let_go.wait(60)
        return super().list(prefix, start_after)


async def _until(board: Board, told: list[tuple[str, bool]]) -> None:
    """Wait for the state of every chain, and whether a problem is told."""
    while [(i.snapshot.state, i.snapshot.problem is not None) for i in board.indexes.values()] != told:
        await asyncio.sleep(0.02)


def test_buckets_that_hang_are_told_and_keep_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_module, "_SILENT_AT_FIRST_SECONDS", 0.2)
    let_go = threading.Event()
    hanging = [Chain(_HangingStore(f"memory://hangs-{number}", let_go)) for number in range(12)]
    healthy = Chain(MemoryStore("memory://healthy"))
    commit_state(healthy, random_state(0))
    board = Board([], poll_seconds=0.05)
    board.take(FoundChains((*hanging, healthy)))

    async def follow() -> None:
        following = asyncio.create_task(board.follow())
        try:
            await asyncio.wait_for(_until(board, [*[("loading", True)] * 12, ("ready", False)]), 20)
            let_go.set()
            await asyncio.wait_for(_until(board, [("ready", False)] * 13), 20)
        finally:
            let_go.set()
            following.cancel()
            board.close()

    asyncio.run(follow())
