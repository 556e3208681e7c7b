"""Forwards one request: to the replica that should answer it, and elsewhere when that one cannot.

A request is tried again where nothing has been answered yet: the replica cannot be reached, breaks off, says that it is
busy (429, 502, 503, 504), or serves another version than was asked for (409 `version-not-served`). Generating has no
effect but its answer, so a request may be computed twice. Every other answer is passed on as it is, also an error.

An answer that is no stream is read to its end before a byte of it is sent on, so that a replica that dies while it
answers is not seen either. A stream is passed on as it comes, and is cut where the replica breaks off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from weightline.errors import ErrorKind
from weightline.front.affinity import AFFINITY_HEADER, key_of
from weightline.front.metrics import FrontMetrics
from weightline.front.replicas import Member, Replicas
from weightline.serving.engines.base import VersionBounds
from weightline.serving.http.errors import error_body
from weightline.serving.http.names import VERSION_HEADER, WAIT_HEADER
from weightline.serving.http.versions import AskedVersion, asked_version, client_left

_log = logging.getLogger(__name__)

REPLICA_HEADER = "x-weightline-replica"
NO_REPLICA = "no-replica"
TIMED_OUT = "timed-out"
MAX_ANSWER_NBYTES = 256 * 1024 * 1024
_BUSY = (429, 502, 503, 504)
_PAUSE_SECONDS = 0.25
#: Headers of one connection, and those that the front writes itself.
_OWN_HEADERS = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
     "upgrade", "host", "content-length", "accept-encoding", "expect", "date", "server", WAIT_HEADER, AFFINITY_HEADER)
)  # fmt: skip

T = TypeVar("T")


class _ElsewhereError(Exception):
    """The member cannot answer this request now. `answer` is what it said, if it said anything."""

    def __init__(self, reason: str, detail: str, answer: Response | None = None) -> None:
        super().__init__(detail)
        self.reason, self.answer = reason, answer


class _ClientLeftError(Exception):
    """The client has closed its connection."""


@dataclass(slots=True)
class _Tries:
    """What was tried for one request. `failed` are members that could not answer in this round, and why."""

    failed: dict[str, str] = field(default_factory=dict)
    last: Response | None = None
    is_confirmed: bool = False
    """Whether the members were asked for their versions before the request is refused."""


class _Stream(StreamingResponse):
    """A stream of a replica, whose connection and count are released when it ends or the client leaves."""

    held: contextlib.AsyncExitStack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.held:
            await super().__call__(scope, receive, send)


class Forwarder:
    """Answers requests of clients by the replicas. `retry_seconds` bounds the time in which no replica can answer."""

    def __init__(
        self, replicas: Replicas, client: httpx.AsyncClient, metrics: FrontMetrics, *, retry_seconds: float
    ) -> None:
        self._replicas, self._client, self._metrics = replicas, client, metrics
        self._retry_seconds = retry_seconds

    async def answer(self, request: Request, asked: AskedVersion | None = None) -> Response:
        """Returns the answer to a request, of a version that it asks for: without `asked`, by its headers.

        InputError that names a header whose value cannot be used.
        """
        began = time.monotonic()
        asked, body = asked or asked_version(request.headers), await request.body()
        key = key_of(_parsed(body), request.headers.get(AFFINITY_HEADER))
        leaving = asyncio.create_task(client_left(request.receive))
        try:
            answer = await self._answer(request, body, asked, key, leaving)
        except _ClientLeftError:
            answer = Response(status_code=499)  # nothing receives it
        finally:
            leaving.cancel()
        self._metrics.count_answer(request.url.path, answer.status_code, time.monotonic() - began)
        return answer

    async def _answer(
        self, request: Request, body: bytes, asked: AskedVersion, key: str, leaving: asyncio.Task[None]
    ) -> Response:
        began, tries = time.monotonic(), _Tries()
        while True:
            chosen = self._replicas.choose(asked.bounds, key, tries.failed)
            if chosen is not None:
                member, is_home = chosen
                try:
                    answer = await self._ask(member, request, body, leaving)
                except _ElsewhereError as failure:
                    self._note(member, failure, tries)
                    continue
                self._metrics.count_routed(member.name, is_home=is_home)
                return answer
            is_behind = bool(self._replicas.up()) and not self._replicas.serve(asked.bounds)
            patience = asked.wait_seconds if is_behind else max(self._retry_seconds, asked.wait_seconds)
            seconds_left = began + patience - time.monotonic()
            if seconds_left > 0:
                pause = min(seconds_left, _PAUSE_SECONDS) if tries.failed else seconds_left
                await _unless_left(self._replicas.changed(pause), leaving)
            elif is_behind and not tries.is_confirmed:
                # A replica may have moved a moment ago, while the answer to the poll is on its way.
                await self._replicas.ask_all()
                tries.is_confirmed = True
            else:
                return self._refusal(asked.bounds, tries)
            tries.failed.clear()

    def _note(self, member: Member, failure: _ElsewhereError, tries: _Tries) -> None:
        member.num_failed += 1
        tries.failed[member.name] = str(failure)
        tries.last = failure.answer or tries.last
        self._metrics.count_retry(member.name, failure.reason)
        _log.info("replica %s does not answer a request: %s", member.name, failure)

    def _refusal(self, bounds: VersionBounds, tries: _Tries) -> Response:
        """Returns the answer of a request that no replica answered."""
        held = {member.name: member.version for member in self._replicas.up()}
        if held and not self._replicas.serve(bounds):
            newest = max(version or 0 for version in held.values())
            wanted = f"version {bounds.lowest} or later" if bounds.pinned is None else f"version {bounds.pinned}"
            why = f"no replica serves {wanted}: {_listed(held)}"
            facts = {"version": newest, "replicas": held}
            return JSONResponse(
                error_body(why, str(ErrorKind.VERSION_NOT_SERVED), facts), 409, {VERSION_HEADER: str(newest)}
            )
        if tries.last is not None:
            return tries.last
        said = self._replicas.reasons() | tries.failed
        why = f"no replica answers: {_listed(said)}" if said else "no replica has a lease of this chain"
        return JSONResponse(error_body(why, NO_REPLICA, {"replicas": said}), 503, {"retry-after": "1"})

    async def _ask(self, member: Member, request: Request, body: bytes, leaving: asyncio.Task[None]) -> Response:
        """Returns the member's answer. _ElsewhereError when another one should be asked."""
        async with contextlib.AsyncExitStack() as held:
            held.enter_context(self._replicas.carrying(member))
            asking = self._exchange(member, request, body, held)
            answer = await _unless_left(_unless_gone(asking, member), leaving)
            member.num_answered += 1
            if isinstance(answer, _Stream):
                answer.held = held.pop_all()
            return answer

    async def _exchange(
        self, member: Member, request: Request, body: bytes, held: contextlib.AsyncExitStack
    ) -> Response:
        """Returns a whole answer, or a stream that has begun. `held` closes the connection."""
        url = f"{member.url}{request.url.path}" + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in _OWN_HEADERS]
        outgoing = self._client.build_request(request.method, url, headers=headers, content=body or None)
        try:
            received = await self._client.send(outgoing, stream=True)
            held.push_async_callback(received.aclose)
            chunks = received.aiter_raw()
            if received.headers.get("content-type", "").startswith("text/event-stream"):
                first = await anext(chunks, b"")
                return _with_headers(_Stream(_joined(first, chunks), received.status_code), member, received)
            answer = _with_headers(Response(await _whole(chunks), received.status_code), member, received)
        except httpx.ReadTimeout:
            why = f"replica {member.name} did not answer in time"
            return JSONResponse(error_body(why, TIMED_OUT, {"replicas": [member.name]}), 504)
        except httpx.TransportError as error:
            self._replicas.lose(member, error)
            raise _ElsewhereError("unreachable", repr(error)) from error
        self._replicas.serves(member, _version_of(received))
        if received.status_code in _BUSY:
            raise _ElsewhereError("busy", f"it answered {received.status_code}", answer)
        if received.status_code == 409 and _code_of(answer.body) == ErrorKind.VERSION_NOT_SERVED:
            raise _ElsewhereError("behind", f"it serves version {received.headers.get(VERSION_HEADER)}", answer)
        return answer


A = TypeVar("A", bound=Response)


def _with_headers(answer: A, member: Member, received: httpx.Response) -> A:
    """Adds the replica's headers to an answer, and its name."""
    for name, value in received.headers.multi_items():
        if name not in _OWN_HEADERS:
            answer.headers.append(name, value)
    answer.headers[REPLICA_HEADER] = member.name
    return answer


async def _whole(chunks: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > MAX_ANSWER_NBYTES:
            raise httpx.RemoteProtocolError(f"an answer of more than {MAX_ANSWER_NBYTES} bytes")
    return bytes(body)


async def _joined(first: bytes, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in chunks:
        yield chunk


async def _unless_left(work: Coroutine[Any, Any, T], leaving: asyncio.Task[None]) -> T:
    """Returns the work's result. Cancels it and raises _ClientLeftError when the client leaves first."""
    task = asyncio.ensure_future(work)
    if not await _ends_first(task, leaving):
        raise _ClientLeftError
    return task.result()


async def _unless_gone(work: Coroutine[Any, Any, T], member: Member) -> T:
    """Returns the work's result. Cancels it and raises _ElsewhereError when the member stops answering polls."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(member.gone.wait())
    try:
        if not await _ends_first(task, gone):
            raise _ElsewhereError("unreachable", "it stopped answering")
        return task.result()
    finally:
        gone.cancel()


async def _ends_first(task: asyncio.Future[Any], other: asyncio.Future[Any]) -> bool:
    """Waits until one of the two ends. Returns whether it is the task; otherwise the task is cancelled."""
    try:
        await asyncio.wait((task, other), return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _parsed(body: bytes) -> object:
    try:
        return json.loads(body) if body else None
    except (ValueError, RecursionError):
        return None  # the replica says what is wrong with it


def _version_of(received: httpx.Response) -> int | None:
    text = received.headers.get(VERSION_HEADER, "")
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _code_of(body: bytes | memoryview) -> object:
    parsed = _parsed(bytes(body))
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return error.get("code") if isinstance(error, dict) else None


def _listed(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {fact}" for name, fact in sorted(facts.items()))
