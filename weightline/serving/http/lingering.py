"""The end of a connection whose client may still be sending: it is closed so that the client can read its answer.

An operating system that closes a socket with unread bytes sends a reset, and the reset throws away what the client has
not read yet. A server that refuses a request before it has read the whole body would so take its own refusal back. So
such a connection first stops sending, then reads and drops what still comes, and is closed once the client closes it,
has sent `max_nbytes`, or has taken `max_seconds` (RFC 9112, section 9.6).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class LingeringTransport:
    """A transport that `close` lets linger when `may_linger` says so. Everything else is the transport's own."""

    def __init__(
        self, transport: asyncio.Transport, may_linger: Callable[[], bool], max_seconds: float, max_nbytes: int
    ) -> None:
        self._transport, self._may_linger = transport, may_linger
        self._max_seconds, self._num_left = max_seconds, max_nbytes
        self._timer: asyncio.TimerHandle | None = None
        self.is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Returns whether the connection takes no more requests."""
        return self.is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Sends what is written, then closes the connection: at once, or after it has lingered."""
        if self.is_closing():
            return
        if not self._may_linger():
            self._transport.close()
            return
        self.is_lingering = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._timer = asyncio.get_running_loop().call_later(self._max_seconds, self._transport.close)

    def drop(self, nbytes: int) -> None:
        """Counts bytes that arrived while the connection lingers, and closes it after too many."""
        self._num_left -= nbytes
        if self._num_left < 0:
            self._transport.close()

    def lost(self) -> None:
        """Ends the time limit of a connection that is closed."""
        if self._timer is not None:
            self._timer.cancel()
