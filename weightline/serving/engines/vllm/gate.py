"""The gate of an asyncio server: requests await it on the loop, a refresh closes it from a thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from weightline.errors import ApplyError


class LoopGate:
    """As `weightline.serving.http.gate.Gate`, without a thread a request. Made on the loop that it belongs to."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._in_flight = 0
        self._opened, self._idle = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._idle.set()

    @asynccontextmanager
    async def passing(self, *, holds_up: bool = True) -> AsyncIterator[None]:
        """Inside, the weights stand still; unless the request is one that does not hold a refresh up."""
        while not self._opened.is_set():
            await self._opened.wait()
        self._count(holds_up)
        try:
            yield
        finally:
            self._count(-holds_up)

    @contextmanager
    def request(self) -> Iterator[None]:
        """`passing`, for a thread other than the loop's."""
        entered = self.passing()
        asyncio.run_coroutine_threadsafe(entered.__aenter__(), self._loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(entered.__aexit__(None, None, None), self._loop).result()

    def close(self, timeout_seconds: float) -> None:
        """Hold new requests back and wait until none is inside. ApplyError after the timeout; then it is open again."""
        asyncio.run_coroutine_threadsafe(self._close(timeout_seconds), self._loop).result()

    def open(self) -> None:
        """Let requests pass. Safe to repeat."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    async def _close(self, timeout_seconds: float) -> None:
        self._opened.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError as error:
            self._opened.set()
            raise ApplyError(
                f"{self._in_flight} requests were still running after {timeout_seconds:g} s, so the engine stays "
                "at its version: ask again, or allow a longer drain",
                num_in_flight=self._in_flight,
            ) from error

    async def _open(self) -> None:
        self._opened.set()

    def _count(self, change: int) -> None:
        """On the loop, without an await: no request passes between a look at the gate and its count."""
        self._in_flight += change
        if self._in_flight:
            self._idle.clear()
        else:
            self._idle.set()
