"""The barrier between requests and a refresh: requests pass, until a refresh drains it; then they wait for its release.

`RequestBarrier` is for servers that answer on threads, `AsyncRequestBarrier` for one that answers on an asyncio loop.
Both prefer the refresh: from the moment that it drains, no new request passes.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from weightline.errors import ApplyError


class RequestBarrier:
    """At most `max_in_flight` requests are inside; the others wait outside, where they do not hold a refresh up."""

    def __init__(self, max_in_flight: int = 1) -> None:
        self._max_in_flight = max_in_flight
        self._num_in_flight = 0
        self._is_open = True
        self._changed = threading.Condition()

    @property
    def is_open(self) -> bool:
        """Whether new requests pass."""
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
        """Holds new requests back and waits until none is inside. ApplyError after the timeout, and requests pass."""
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
    """Requests await it on the loop that it was made on; a refresh drains it from a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._num_in_flight = 0
        self._opened, self._idle = asyncio.Event(), asyncio.Event()
        self._opened.set()
        self._idle.set()

    @asynccontextmanager
    async def passing(self, *, is_counted: bool = True) -> AsyncIterator[None]:
        """Waits until a request may pass. Inside, the weights do not change, unless the request is not counted."""
        while not self._opened.is_set():
            await self._opened.wait()
        self._count(is_counted)
        try:
            yield
        finally:
            self._count(-is_counted)

    @contextmanager
    def request(self) -> Iterator[None]:
        """`passing`, for a thread other than the loop's."""
        entered = self.passing()
        asyncio.run_coroutine_threadsafe(entered.__aenter__(), self._loop).result()
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(entered.__aexit__(None, None, None), self._loop).result()

    def drain(self, timeout_seconds: float) -> None:
        """Holds new requests back and waits until none is inside. ApplyError after the timeout, and requests pass."""
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
        """Runs on the loop without an await, so that no request passes between a look at the barrier and its count."""
        self._num_in_flight += change
        if self._num_in_flight:
            self._idle.clear()
        else:
            self._idle.set()


def _drain_timeout(num_in_flight: int, timeout_seconds: float) -> ApplyError:
    return ApplyError(
        f"{num_in_flight} requests were still running after {timeout_seconds:g} s, so the engine stays at its version: "
        "ask again, or allow a longer drain",
        num_in_flight=num_in_flight,
    )
