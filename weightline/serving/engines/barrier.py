"""The barrier between requests and a refresh: requests pass it until a refresh drains it, then wait for its release.

`RequestBarrier` is for servers that answer on threads, `AsyncRequestBarrier` for servers that answer on an asyncio
loop. Both prefer the refresh: once it drains, no new request passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from weightline.errors import ApplyError


class RequestBarrier:
    """A barrier that at most `max_in_flight` requests pass at a time. The others wait and do not delay a refresh."""

    def __init__(self, max_in_flight: int = 1) -> None:
        self._max_in_flight = max_in_flight
        self._num_in_flight = 0
        self._is_open = True
        self._changed = threading.Condition()

    @property
    def is_open(self) -> bool:
        """Returns whether new requests pass."""
        return self._is_open

    @contextmanager
    def request(self) -> Iterator[None]:
        """Waits until a request may pass. Inside the context the weights do not change."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open and self._num_in_flight < self._max_in_flight)
            self._num_in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_in_flight -= 1
                self._changed.notify_all()

    def drain(self, timeout_seconds: float) -> None:
        """Holds new requests back and waits until none is in flight. After the timeout it reopens: ApplyError."""
        with self._changed:
            self._is_open = False
            if not self._changed.wait_for(lambda: self._num_in_flight == 0, timeout_seconds):
                num_in_flight = self._num_in_flight
                self._release()
                raise _drain_timeout(num_in_flight, timeout_seconds)

    def release(self) -> None:
        """Lets requests pass again. Safe to repeat."""
        with self._changed:
            self._release()

    def _release(self) -> None:
        self._is_open = True
        self._changed.notify_all()


class AsyncRequestBarrier:
    """A barrier that requests await on the loop that it was made on. A refresh drains it from another thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_in_flight = 0
        self._opened, self._idle = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._idle.set()

    @asynccontextmanager
    async def passing(self, *, is_counted: bool = True) -> AsyncIterator[None]:
        """Waits until a request may pass. Inside the context the weights do not change if the request is counted."""
        while not self._opened.is_set():
            await self._opened.wait()
        self._count(is_counted)
        try:
            yield
        finally:
            self._count(-is_counted)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Does the same as `passing`, for threads other than the loop's."""
        entered = self.passing()
        asyncio.run_coroutine_threadsafe(entered.__aenter__(), self._loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(entered.__aexit__(None, None, None), self._loop).result()

    def drain(self, timeout_seconds: float) -> None:
        """Holds new requests back and waits until none is in flight. After the timeout it reopens: ApplyError."""
        asyncio.run_coroutine_threadsafe(self._drain(timeout_seconds), self._loop).result()

    def release(self) -> None:
        """Lets requests pass again. Safe to repeat."""
        asyncio.run_coroutine_threadsafe(self._release(), self._loop).result()

    async def _drain(self, timeout_seconds: float) -> None:
        self._opened.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_seconds)
        except TimeoutError as error:
            self._opened.set()
            raise _drain_timeout(self._num_in_flight, timeout_seconds) from error

    async def _release(self) -> None:
        self._opened.set()

    def _count(self, change: int) -> None:
        """Counts a request. Runs on the loop without an await, so no drain starts between the check and the count."""
        self._num_in_flight += change
        if self._num_in_flight:
            self._idle.clear()
        else:
            self._idle.set()


def _drain_timeout(num_in_flight: int, timeout_seconds: float) -> ApplyError:
    return ApplyError(
        f"{num_in_flight} requests were still running after {timeout_seconds:g} s, so the engine stays at its version: "
        "refresh again, or allow a longer drain",
        num_in_flight=num_in_flight,
    )
