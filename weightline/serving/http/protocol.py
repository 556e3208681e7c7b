"""Connections of the servers that weightline starts: uvicorn's HTTP/1.1, with bounds on what a client can hold.

uvicorn gives no time limit to the head of a request, and counts connections only once a request has arrived. So here

- a connection whose request has not begun to arrive completely within MAX_HEAD_SECONDS is closed;
- when all connections are taken, the one that has been sending its request for the longest gives way to a new one. If
  each of them has sent its request, the new one is answered 503;
- a client that leaves its answer unread for MAX_UNREAD_SECONDS is disconnected;
- a client that is answered before it has sent its whole request can read the answer: for MAX_LINGER_SECONDS, and up to
  MAX_LINGER_NBYTES, what it still sends is read and dropped.

The number of connections stays below the process's limit of open files, so that files can still be opened.
"""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from weightline.serving.http.bounds import MAX_HEADER_NBYTES, log_refusal
from weightline.serving.http.lingering import LingeringTransport

MAX_CONNECTIONS = 512
MAX_HEAD_SECONDS = 30.0
MAX_UNREAD_SECONDS = 30.0
MAX_LINGER_SECONDS = 2.0
MAX_LINGER_NBYTES = 4 * 1024 * 1024
#: Open files that are left for everything but connections, at the least.
_RESERVED_FILES = 64
#: Connections that the event loop accepts before it looks at the first of them.
_BACKLOG = 64
#: Connections that linger at one time. Any more are closed at once. They come out of _RESERVED_FILES.
_MAX_LINGERING = 32
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\ncontent-length: 46\r\nretry-after: 1\r\n"
    b"connection: close\r\n\r\nall connections are taken: send it again later"
)

# uvicorn warns of every bad request in a line of its own: here `log_refusal` does, which is bounded.
_uvicorn_log = logging.getLogger("weightline.serving.http.uvicorn")
_uvicorn_log.setLevel(logging.ERROR)


def connection_limit() -> int:
    """Returns how many connections a server accepts: 512, or fewer where the process may open few files."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, (num_files - _RESERVED_FILES) // 2))


def server_config(app: Any, graceful_seconds: int) -> uvicorn.Config:
    """Returns uvicorn's configuration of a bounded server."""
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        limit_concurrency=connection_limit(),
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=MAX_HEADER_NBYTES,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=graceful_seconds,
    )


class BoundedProtocol(H11Protocol):
    """One connection. The module's text says what is bounded."""

    max_head_seconds = MAX_HEAD_SECONDS
    max_unread_seconds = MAX_UNREAD_SECONDS
    max_linger_seconds = MAX_LINGER_SECONDS
    transport: LingeringTransport  # type: ignore[assignment]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.logger = _uvicorn_log
        # uvicorn would refuse whole requests while connections that were just cut still count.
        self._max_connections, self.limit_concurrency = self.limit_concurrency, None
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._is_surplus = False
        self.waits_since = 0.0

    @property
    def is_sending(self) -> bool:
        """Whether the server waits for this client: for the head of a request, or for the rest of its body."""
        return self._awaits_head or self.cycle.more_body

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        lingering = LingeringTransport(transport, self._may_linger, self.max_linger_seconds, MAX_LINGER_NBYTES)
        super().connection_made(lingering)  # type: ignore[arg-type]
        self._watch_head()
        held = [one for one in self.connections if isinstance(one, BoundedProtocol) and not one.transport.is_closing()]
        if self._max_connections is None or len(held) <= self._max_connections:
            return
        slowest = min((one for one in held if one.is_sending), key=lambda one: one.waits_since)
        if slowest is self:
            self._is_surplus = True
            self.transport.write(_FULL)
            self.transport.close()
            log_refusal("a connection", "all connections are taken")
        else:
            slowest.cut("all connections are taken, and it sent slowest")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_unread_timer()
        self.transport.lost()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_lingering:
            self.transport.drop(len(data))
        else:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def send_400_response(self, msg: str) -> None:
        log_refusal("a request that is not HTTP/1.1", "status 400")
        super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread_timer is None:
            why = f"it left its answer unread for {self.max_unread_seconds:g} s"
            self._unread_timer = self.loop.call_later(self.max_unread_seconds, self.cut, why)

    def resume_writing(self) -> None:
        self._stop_unread_timer()
        super().resume_writing()

    def cut(self, why: str) -> None:
        """Closes the connection at once."""
        log_refusal("a connection", why)
        self.transport.abort()

    def _may_linger(self) -> bool:
        is_sent_whole = self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) and not self._is_surplus
        lingering = [one for one in self.connections if isinstance(one, BoundedProtocol) and one.transport.is_lingering]
        return not is_sent_whole and len(lingering) < _MAX_LINGERING

    def _watch_head(self) -> None:
        if not self._awaits_head:
            if self._head_timer is not None:
                self.waits_since = self.loop.time()
            self._stop_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self.waits_since = self.loop.time()
            why = f"no request arrived within {self.max_head_seconds:g} s"
            self._head_timer = self.loop.call_later(self.max_head_seconds, self.cut, why)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
