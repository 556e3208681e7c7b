"""What can go wrong with one request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cut:
    """The connection is cut before anything happened."""


@dataclass(frozen=True, slots=True)
class LoseReply:
    """The request takes effect; the connection is cut before the reply."""


@dataclass(frozen=True, slots=True)
class Late:
    """The connection is cut; the request takes effect only after `seconds`, whatever happened since."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Status:
    """An answer by a proxy or a rate limiter: nothing happened."""

    code: int
    name: str = "SlowDown"
    """The error's code in S3's dialect."""


@dataclass(frozen=True, slots=True)
class Truncate:
    """The reply's header promises all bytes; the connection is cut after half of them."""


Fault = Cut | LoseReply | Late | Status | Truncate
#: Decides, from the request's number (from 0), method and path, what goes wrong with it.
FaultPlan = Callable[[int, str, str], Fault | None]
