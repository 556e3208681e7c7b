"""The gate between requests and a refresh: requests pass while it is open, a refresh closes it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weightline.errors import ApplyError


class Gate:
    """Readers-writer lock that prefers the writer: from the moment a refresh asks, no new request passes.

    At most `max_in_flight` requests are inside; the others wait outside, where they do not hold a refresh up.
    """

    def __init__(self, max_in_flight: int = 1) -> None:
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._is_open = True
        self._changed = threading.Condition()

    @property
    def is_open(self) -> bool:
        return self._is_open

    @contextmanager
    def request(self) -> Iterator[None]:
        """Inside, the weights stand still."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open and self._in_flight < self._max_in_flight)
            self._in_flight += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def close(self, timeout_seconds: float) -> None:
        """Hold new requests back and wait until none is inside. ApplyError after the timeout; then it is open again."""
        with self._changed:
            self._is_open = False
            if not self._changed.wait_for(lambda: self._in_flight == 0, timeout_seconds):
                num_in_flight = self._in_flight
                self._open()
                raise ApplyError(
                    f"{num_in_flight} requests were still running after {timeout_seconds:g} s, so the engine stays at "
                    "its version: ask again, or allow a longer drain",
                    num_in_flight=num_in_flight,
                )

    def open(self) -> None:
        """Let requests pass. Safe to repeat."""
        with self._changed:
            self._open()

    def _open(self) -> None:
        self._is_open = True
        self._changed.notify_all()
