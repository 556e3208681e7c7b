"""The version that a request asks for: its headers, the wait until that version is served, and the refusal.

    x-weightline-min-version: N     this version or a newer one answers
    x-weightline-version: N         exactly this version answers
    x-weightline-wait-seconds: S    wait for it, for so long at most (without it: not at all)

The embedded server and vLLM share this code. The version is checked inside the request barrier, so that it does not
change between the check and the answer. Requests that wait are coroutines: they hold no thread, and each change of the
version wakes them.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import Receive

from weightline.errors import ApplyError, InputError, VersionNotServedError, http_status
from weightline.serving.engines.base import VersionBounds
from weightline.serving.http.errors import error_body
from weightline.serving.http.names import MIN_VERSION_HEADER, MIXING_HEADER, VERSION_HEADER, WAIT_HEADER
from weightline.serving.replica.watch import VersionWatch

MAX_WAIT_SECONDS = 600.0
#: Requests of a kind that wait for a version at a time. Further ones are refused with a status that allows a retry.
MAX_WAITING = 128
_MAX_DIGITS = 18

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class AskedVersion:
    """The versions that may answer a request, and how long it waits for one of them."""

    bounds: VersionBounds
    wait_seconds: float = 0.0


def asked_version(headers: Headers) -> AskedVersion:
    """Parses the headers of a request. InputError that names a header whose value cannot be used."""
    lowest, pinned = _version(headers, MIN_VERSION_HEADER), _version(headers, VERSION_HEADER)
    if lowest is not None and pinned is not None and pinned < lowest:
        raise InputError(
            f"{VERSION_HEADER}: {pinned} is below {MIN_VERSION_HEADER}: {lowest}: leave one of them out",
            field=VERSION_HEADER,
        )
    if pinned is not None and headers.get(MIXING_HEADER) == "allow":
        raise InputError(
            f"{MIXING_HEADER}: allow lets several versions answer: leave it out, or {VERSION_HEADER}",
            field=VERSION_HEADER,
        )
    return AskedVersion(VersionBounds(lowest, pinned), _wait_seconds(headers))


def not_served(error: VersionNotServedError) -> JSONResponse:
    """Returns the answer to a request for a version that is not served. Its header names the one that is."""
    headers = {} if error.version is None else {VERSION_HEADER: str(error.version)}
    return JSONResponse(error_body(str(error), str(error.kind), error.facts), http_status(error), headers)


class VersionWaits:
    """Lets the requests of one kind wait for versions, at most `max_waiting` at a time.

    `version` returns the version that is served; None while none is, or while a refresh is between two of them.
    """

    def __init__(self, watch: VersionWatch, version: Callable[[], int | None], max_waiting: int = MAX_WAITING) -> None:
        self._watch, self._version, self._max_waiting = watch, version, max_waiting
        self._num_waiting = 0

    async def answered(self, asked: AskedVersion, attempt: Callable[[], Awaitable[T]], receive: Receive) -> T:
        """Returns the result of `attempt`, which is called once a version that may answer is served.

        `attempt` checks the version by itself, where it cannot change, and raises VersionNotServedError; it is called
        again after the next change. That error is raised when the time is over, or when the client has left, which
        `receive` says. ApplyError when too many requests wait already.
        """
        if asked.bounds.accept_all:
            return await attempt()
        deadline = asyncio.get_running_loop().time() + asked.wait_seconds
        with self._watch.waiting() as changed:
            while True:
                changed.clear()
                try:
                    # A refresh that is between two versions is over soon: the attempt waits for it at the barrier.
                    if (version := self._version()) is not None:
                        asked.bounds.require(version)
                    return await attempt()
                except VersionNotServedError:
                    if not await self._is_changed(changed, deadline, receive):
                        raise

    async def _is_changed(self, changed: asyncio.Event, deadline: float, receive: Receive) -> bool:
        """Waits for a change of the version. Returns False at the deadline, or when the client leaves before."""
        seconds = deadline - asyncio.get_running_loop().time()
        if seconds <= 0:
            return False
        if self._num_waiting >= self._max_waiting:
            raise ApplyError(f"{self._max_waiting} requests wait for a version already: send it again later")
        self._num_waiting += 1
        waits = (asyncio.ensure_future(changed.wait()), asyncio.ensure_future(client_left(receive)))
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._num_waiting -= 1
            for one in waits:
                one.cancel()
        return changed.is_set()


async def client_left(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _version(headers: Headers, name: str) -> int | None:
    text = _single(headers, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InputError(f"{name}: {text[:40]!r} is no version: send a number, 0 or more", field=name)
    return int(text)


def _wait_seconds(headers: Headers) -> float:
    text = _single(headers, WAIT_HEADER)
    try:
        seconds = 0.0 if text is None else float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise InputError(
            f"{WAIT_HEADER}: {(text or '')[:40]!r} is not a number of seconds from 0 to {MAX_WAIT_SECONDS:g}",
            field=WAIT_HEADER,
        )
    return seconds


def _single(headers: Headers, name: str) -> str | None:
    found = headers.getlist(name)
    if len(found) > 1:
        raise InputError(f"{name} is sent {len(found)} times: send it once", field=name)
    return found[0].strip() if found else None
