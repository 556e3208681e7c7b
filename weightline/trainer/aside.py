"""Calls that are done beside training, one after the other, on a thread of their own.

Records beside versions are written so. Over a bucket that shows a write seconds later, a record takes as long as a
commit, and must not delay the next one.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class CallThread:
    """Does calls in order. The thread starts with the first one, and ends with the process at the latest."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(self, work: Callable[[], object]) -> None:
        """Queues a call, which must raise nothing. Returns at once. For one thread at a time."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(work)

    def close(self, limit_seconds: float) -> bool:
        """Ends the thread after all queued calls. Returns whether it ended within the limit. Safe to repeat."""
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(limit_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
