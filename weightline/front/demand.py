"""Which versions may answer a request, by its headers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.datastructures import Headers

from weightline.errors import InputError

MIN_HEADER = "x-weightline-min-version"
VERSION_HEADER = "x-weightline-version"
WAIT_HEADER = "x-weightline-wait-seconds"
MAX_WAIT_SECONDS = 600.0
_MAX_VERSION = 2**63


@dataclass(frozen=True, slots=True)
class Demand:
    """The versions that may answer, and the seconds for which the request waits for one of them."""

    least: int | None = None
    pinned: int | None = None
    wait_seconds: float = 0.0

    def is_met_by(self, version: int | None) -> bool:
        """Returns whether a replica that serves the version (None: none yet) may answer."""
        if version is None:
            return False
        if self.pinned is not None and version != self.pinned:
            return False
        return self.least is None or version >= self.least

    def __str__(self) -> str:
        if self.pinned is not None:
            return f"version {self.pinned}"
        return "any version" if self.least is None else f"version {self.least} or later"


def parse_demand(headers: Headers) -> Demand:
    """Returns what the headers demand. InputError for a value that is no version, or no number of seconds."""
    wait = headers.get(WAIT_HEADER)
    return Demand(
        least=_version(MIN_HEADER, headers.get(MIN_HEADER)),
        pinned=_version(VERSION_HEADER, headers.get(VERSION_HEADER)),
        wait_seconds=0.0 if wait is None else parse_wait(WAIT_HEADER, wait),
    )


def parse_wait(name: str, text: str) -> float:
    """Returns a number of seconds to wait, at most MAX_WAIT_SECONDS. InputError, which names the field, for others."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise InputError(f"{name}: {text!r} is not between 0 and {MAX_WAIT_SECONDS:g} seconds", field=name)
    return seconds


def parse_version(name: str, text: str) -> int:
    """Returns a version. InputError, which names the field, for a text that is none."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 19 or int(text) >= _MAX_VERSION:
        raise InputError(f"{name}: {text[:40]!r} is not a version", field=name)
    return int(text)


def _version(name: str, text: str | None) -> int | None:
    return None if text is None else parse_version(name, text)
