"""vLLM's app behind the barrier: what the weights answer comes from one version, and says from which.

Why no answer mixes versions: a request is counted from before vLLM sees it until its last byte is sent, a refresh waits
until none is counted, and new ones wait until the refresh is over. A caller who sends `x-weightline-mixing: allow` is
not counted: its request stands in vLLM's queue during the refresh, is computed again from its tokens by the new weights
and goes on; the answer names the versions that it began and ended with, or, on a stream, the one that it began with.

A request is counted once its body is here, and who takes no part of its answer for long is cut off: neither a slow
sender nor a slow reader holds everybody up.
"""

from __future__ import annotations

import asyncio
import json
from typing import Protocol

from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weightline.errors import ErrorKind
from weightline.serving.engines.barrier import AsyncRequestBarrier
from weightline.serving.http.app import VERSION_HEADER
from weightline.serving.http.errors import error_body

MIXING_HEADER = "x-weightline-mixing"
MAX_BODY_NBYTES = 256 * 1024 * 1024
MAX_BODY_SECONDS = 300.0
#: How long a caller may leave a full buffer unread.
MAX_SEND_SECONDS = 30.0


class Versioned(Protocol):
    """What is asked of an engine here."""

    @property
    def version(self) -> int | None:
        """The version whose weights are in place; None while there is no checked one."""


class VersionedApp:
    """Pure ASGI, for HTTP. `answered` counts the answers of status 200."""

    def __init__(
        self,
        app: ASGIApp,
        barrier: AsyncRequestBarrier,
        engine: Versioned,
        answered: Counter,
        *,
        max_body_nbytes: int = MAX_BODY_NBYTES,
        max_body_seconds: float = MAX_BODY_SECONDS,
        max_send_seconds: float = MAX_SEND_SECONDS,
    ) -> None:
        self._app, self._barrier, self._engine, self._answered = app, barrier, engine, answered
        self._max_body_nbytes, self._max_body_seconds = max_body_nbytes, max_body_seconds
        self._max_send_seconds = max_send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read(Request(scope, receive))
        except ClientDisconnect:
            return
        except TimeoutError:
            why = f"the body did not arrive within {self._max_body_seconds:g} s"
            await _refuse(408, why, {"connection": "close"})(scope, receive, send)
            return
        if body is None:
            why = f"the body has more than {self._max_body_nbytes} bytes"
            await _refuse(413, why, {"connection": "close"})(scope, receive, send)
        elif _is_background(scope["path"], body):
            why = "background: not here, where an answer comes from one version: leave it out, or ask for a stream"
            await _refuse(400, why)(scope, receive, send)
        else:
            await self._pass(scope, _replaying(body, receive), send)

    async def _read(self, request: Request) -> bytes | None:
        """The whole body; None when it is too large. TimeoutError, and ClientDisconnect when the caller left."""
        body = bytearray()
        async with asyncio.timeout(self._max_body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._max_body_nbytes:
                    return None
        return bytes(body)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        allows_mixing = Request(scope).headers.get(MIXING_HEADER) == "allow"
        async with self._barrier.passing(is_counted=not allows_mixing):
            if self._engine.version is None:
                await unavailable("no checked version is loaded: ask again after the next refresh")(
                    scope, receive, send
                )
                return
            answer = _NamedAnswer(self._engine, send, self._max_send_seconds)
            await self._app(scope, receive, answer)
        if answer.status == 200:
            self._answered.inc()


class _NamedAnswer:
    """`send`, with a header that names the version the answer began with and, where it is another, ended with.

    TimeoutError when the caller does not take it: the server then drops the connection.
    """

    def __init__(self, engine: Versioned, send: Send, max_send_seconds: float) -> None:
        self._engine, self._send, self._max_send_seconds = engine, send, max_send_seconds
        self._first = engine.version
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            last = self._engine.version
            versions = f"{self._first}" if last in (self._first, None) else f"{self._first},{last}"
            message["headers"] = [*message.get("headers", ()), (VERSION_HEADER.encode(), versions.encode())]
        async with asyncio.timeout(self._max_send_seconds):
            await self._send(message)


def unavailable(why: str) -> JSONResponse:
    """Nothing can be answered now: ask again."""
    return JSONResponse(error_body(why, str(ErrorKind.APPLY)), 503, {"retry-after": "1"})


def _refuse(status: int, why: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(why, str(ErrorKind.INPUT)), status, headers)


def _replaying(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read: the body once more, then whether the caller left."""
    is_told = False

    async def replayed() -> Message:
        nonlocal is_told
        if is_told:
            return await receive()
        is_told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _is_background(path: str, body: bytes) -> bool:
    """Whether vLLM would answer at once and generate later, when nothing of it is counted any more."""
    if not path.endswith("/v1/responses"):
        return False
    try:
        asked = json.loads(body)
    except ValueError:
        return False  # vLLM refuses it
    return isinstance(asked, dict) and bool(asked.get("background"))
