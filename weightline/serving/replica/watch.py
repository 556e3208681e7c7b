"""Wakes requests that wait for a version, on whatever event loop they wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


class VersionWatch:
    """The waiters for changes of one replica's version. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}

    @contextmanager
    def waiting(self) -> Iterator[asyncio.Event]:
        """Yields an event of the running loop that is set after each change of the version. The waiter clears it."""
        event = asyncio.Event()
        with self._lock:
            self._waiting[event] = asyncio.get_running_loop()
        try:
            yield event
        finally:
            with self._lock:
                del self._waiting[event]

    def announce(self) -> None:
        """Sets the events of all waiters. For any thread."""
        with self._lock:
            waiting = list(self._waiting.items())
        for event, loop in waiting:
            with suppress(RuntimeError):  # the loop was closed since then, and its waiters with it
                loop.call_soon_threadsafe(event.set)
