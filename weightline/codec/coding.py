"""The interface of a delta coding, the registry of codings, and the threads that run them.

A chunk is a run of pieces of one dtype; a piece is a segment, or a tile of one, with the changes that fall in it. A
coding turns the changes of a chunk into two streams (positions, steps) and back.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from weightline.errors import UnsupportedFeatureError
from weightline.types import BitsArray, Changes, Segment

Streams = tuple[bytes, bytes]

#: For fewer changes, to start threads takes longer than the work on them.
_MANY_CHANGES = 1 << 16

Item = TypeVar("Item")

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ChunkBase:
    """Access of a decoder to the state before the delta, by the number of the piece in its chunk."""

    #: True for each piece whose changes the caller wants.
    wanted: Sequence[bool]
    #: Returns the bits of a piece. Decoders call it for wanted pieces only.
    bits: Callable[[int], BitsArray]


class DeltaCoding(Protocol):
    """Encodes and decodes one chunk. Pure: the same input gives the same bytes."""

    name: str
    #: True when `encode` needs RankedChanges (`capture(..., ranked=True)`) and `decode` finds positions by the base:
    #: against another state, such as the one after the delta, they cannot be found.
    ranked: bool

    def encode(self, pieces: Sequence[Changes]) -> Streams:
        """Returns (positions, steps) of adjacent pieces of one dtype, none longer than a tile.

        InputError for missing ranks.
        """

    def decode(
        self, streams: Streams, pieces: Sequence[Segment], num_changed: int, base: ChunkBase
    ) -> Iterator[Changes]:
        """Yields the changes of every wanted piece, in order. PayloadError for streams that break a rule."""


def codings() -> dict[str, DeltaCoding]:
    """Returns every delta coding by its name in payloads and recipes."""
    from weightline.codec.gap import GapCoding
    from weightline.codec.magnitude import MagnitudeCoding

    found: tuple[DeltaCoding, ...] = (GapCoding(), MagnitudeCoding())
    return {coding.name: coding for coding in found}


def coding_named(name: str) -> DeltaCoding:
    """Returns the coding of that name. UnsupportedFeatureError when this release has none."""
    known = codings()
    if name not in known:
        raise UnsupportedFeatureError(
            f"unknown coding {name!r}; this release supports {', '.join(sorted(known))}", feature=name
        )
    return known[name]


def num_cpus() -> int:
    """Returns the number of CPUs that the calling thread may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_threads_for(num_changed: int) -> int:
    """Returns the number of threads for work on changes: one for few of them, and else all CPUs of the caller."""
    return num_cpus() if num_changed >= _MANY_CHANGES else 1


def ordered_map(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> Iterator[Result]:
    """Yields `map(work, items)` in order, computed on threads. At most two items per thread are held at a time."""
    if num_threads <= 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) >= 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
