"""Bounds on requests, for every app that weightline serves: headers, framing, the token, and the size of a body.

What a request costs is decided before it is read. A request that needs the token is refused before a byte of its body
is taken, a body is read only for routes that take one, and only up to that route's size, within a time limit.
The connections themselves are bounded in `weightline.serving.http.protocol`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightline.errors import ErrorKind
from weightline.serving.http.errors import UNAUTHORIZED, error_body

MAX_BODY_NBYTES = 256 * 1024 * 1024
MAX_BODY_SECONDS = 300.0
MAX_HEADERS = 100
MAX_HEADER_NBYTES = 32 * 1024
#: Bytes of bodies that one app holds at a time, over all requests.
MAX_HELD_NBYTES = 256 * 1024 * 1024

_log = logging.getLogger(__name__)
_MAX_LOGGED = 200


class RefusalLog:
    """Logs refusals, at most `max_lines` in `window_seconds`: a flood of bad requests must not fill a disk."""

    def __init__(self, max_lines: int = 20, window_seconds: float = 10.0) -> None:
        self._max_lines, self._window_seconds = max_lines, window_seconds
        self._began, self._num_lines, self._num_dropped = -window_seconds, 0, 0

    def __call__(self, what: str, why: str) -> None:
        now = time.monotonic()
        if now - self._began >= self._window_seconds:
            if self._num_dropped:
                _log.info("refused %d more requests", self._num_dropped)
            self._began, self._num_lines, self._num_dropped = now, 0, 0
        if self._num_lines >= self._max_lines:
            self._num_dropped += 1
            return
        self._num_lines += 1
        # Quoted: a path may hold line ends and control characters.
        _log.info("refused %s: %s", json.dumps(what[:_MAX_LOGGED]), why[:_MAX_LOGGED])


log_refusal = RefusalLog()


def refusal(status: int, why: str, code: str = str(ErrorKind.INPUT)) -> JSONResponse:
    """Returns the answer to a request that is not read to its end: the connection is closed after it."""
    headers = {"connection": "close"}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(why, code), status, headers)


def unauthorized() -> JSONResponse:
    """Returns the refusal of a request without the replica's token."""
    return refusal(401, "this route needs the replica's token: Authorization: Bearer ...", UNAUTHORIZED)


def refusal_of_headers(scope: Scope) -> JSONResponse | None:
    """Returns the refusal of a request with too many or too large headers, or with two statements of its length."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_NBYTES:
        return refusal(431, f"a request has at most {MAX_HEADERS} headers of {MAX_HEADER_NBYTES} bytes in all")
    names = {name.lower() for name, _ in headers}
    if b"content-length" in names and b"transfer-encoding" in names:
        # A proxy in front may believe the other one, and take a part of the body for a request of its own.
        return refusal(400, "content-length and transfer-encoding together: send one of them")
    return None


@dataclass(slots=True)
class BodyReader:
    """Reads bodies up to a size, each within a time, and all of them together up to `max_held_nbytes`."""

    max_seconds: float = MAX_BODY_SECONDS
    max_held_nbytes: int = MAX_HELD_NBYTES
    held_nbytes: int = field(default=0, init=False)

    @asynccontextmanager
    async def holding(self, scope: Scope, receive: Receive, send: Send, max_nbytes: int) -> AsyncIterator[bytes | None]:
        """Yields the whole body, held to the end of the block. None when it was refused, or the client left."""
        try:
            body = await self._read(scope, receive, max_nbytes)
        except ClientDisconnect:
            yield None
            return
        if isinstance(body, JSONResponse):
            await body(scope, receive, send)
            yield None
            return
        try:
            yield body
        finally:
            self._release(len(body))

    async def _read(self, scope: Scope, receive: Receive, max_nbytes: int) -> bytes | JSONResponse:
        """Returns the whole body, or the refusal. ClientDisconnect when the client left. Call `_release` afterwards."""
        too_large = f"the body has more than {max_nbytes} bytes"
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > max_nbytes:
            return refusal(413, too_large)
        body = bytearray()
        try:
            async with asyncio.timeout(self.max_seconds):
                async for chunk in Request(scope, receive).stream():
                    body += chunk
                    self.held_nbytes += len(chunk)
                    if len(body) > max_nbytes:
                        return self._given_up(body, refusal(413, too_large))
                    if self.held_nbytes > self.max_held_nbytes:
                        why = "the bodies of other requests take all the memory there is for them: send it again later"
                        return self._given_up(body, refusal(503, why, str(ErrorKind.APPLY)))
        except TimeoutError:
            return self._given_up(body, refusal(408, f"the body did not arrive within {self.max_seconds:g} s"))
        except BaseException:
            self._release(len(body))
            raise
        return bytes(body)

    def _release(self, nbytes: int) -> None:
        self.held_nbytes -= nbytes

    def _given_up(self, body: bytearray, answer: JSONResponse) -> JSONResponse:
        self._release(len(body))
        return answer


class ReadFirst:
    """A middleware in pure ASGI whose app gets whole bodies of at most `max_nbytes`, each read within a time."""

    def __init__(self, app: ASGIApp, max_nbytes: int = MAX_BODY_NBYTES, reader: BodyReader | None = None) -> None:
        self._app, self._max_nbytes, self._reader = app, max_nbytes, reader or BodyReader()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._reader.holding(scope, receive, send, self._max_nbytes) as body:
            if body is not None:
                await self._app(scope, replaying(body, receive), send)


class BoundedApp:
    """A middleware in pure ASGI that lets through requests within bounds. The app behind it gets whole bodies.

    `max_body_nbytes` by method and path; the body of any other request is not read. `is_refused` decides by the
    request's head alone whether it lacks the token.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_nbytes: Mapping[tuple[str, str], int],
        is_refused: Callable[[Scope], bool] = lambda _: False,
        reader: BodyReader | None = None,
    ) -> None:
        self._app, self._is_refused, reader = app, is_refused, reader or BodyReader()
        self._readers = {route: ReadFirst(app, max_nbytes, reader) for route, max_nbytes in max_body_nbytes.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watched = _LoggedAnswer(scope, send, has_unread_body=False)
        answer = refusal_of_headers(scope) or (unauthorized() if self._is_refused(scope) else None)
        if answer is not None:
            await answer(scope, receive, watched)
            return
        read_first = self._readers.get((scope["method"], scope["path"]))
        if read_first is not None:
            await read_first(scope, receive, watched)
            return
        unread = _LoggedAnswer(scope, send, has_unread_body=announces_body(scope))
        await self._app(scope, replaying(b"", receive), unread)


class _LoggedAnswer:
    """A `send` that logs answers of 400 and more, and ends the connection after an answer to an unread body."""

    def __init__(self, scope: Scope, send: Send, *, has_unread_body: bool) -> None:
        self._scope, self._send, self._has_unread_body = scope, send, has_unread_body

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                log_refusal(f"{self._scope['method']} {self._scope['path']}", f"status {message['status']}")
            if self._has_unread_body:
                MutableHeaders(scope=message)["connection"] = "close"
        await self._send(message)


def announces_body(scope: Scope) -> bool:
    """Returns whether a request has a body, by its headers."""
    headers = Headers(scope=scope)
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


def replaying(body: bytes, receive: Receive) -> Receive:
    """Returns the `receive` of a request whose body was read: the body once more, then the client's messages."""
    is_replayed = False

    async def replayed() -> Message:
        nonlocal is_replayed
        if is_replayed:
            return await receive()
        is_replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
