"""What a position coding is, and the registry that names them.

A chunk is a run of pieces of one dtype; a piece is a segment, or a tile of one, with the changes that fall in it. A
coding turns the changes of a chunk into two streams (positions, steps) and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightline.errors import UnsupportedFeatureError
from weightline.types import BitsArray, Changes, Segment

Streams = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class ChunkBase:
    """What a decoder may ask about the state before the delta, by the number of the piece in its chunk."""

    #: Whether the caller wants the changes of this piece.
    wanted: Sequence[bool]
    #: The bits of a piece; asked for wanted pieces only.
    bits: Callable[[int], BitsArray]


class DeltaCoding(Protocol):
    """Encode and decode one chunk. Pure: same input, same bytes."""

    name: str
    #: Whether `encode` needs RankedChanges (`capture(..., ranked=True)`), and `decode` finds positions by the base:
    #: against another state, such as the one after the delta, they cannot be found.
    ranked: bool

    def encode(self, pieces: Sequence[Changes]) -> Streams:
        """(positions, steps) of adjacent pieces of one dtype, none longer than a tile. InputError for missing ranks."""

    def decode(
        self, streams: Streams, pieces: Sequence[Segment], num_changed: int, base: ChunkBase
    ) -> Iterator[Changes]:
        """The changes of every wanted piece, in order. Raises PayloadError for streams that break a rule."""


def codings() -> dict[str, DeltaCoding]:
    """Every delta coding by its name in payloads and recipes."""
    from weightline.codec.gap import GapCoding
    from weightline.codec.magnitude import MagnitudeCoding

    found: tuple[DeltaCoding, ...] = (GapCoding(), MagnitudeCoding())
    return {coding.name: coding for coding in found}


def coding_named(name: str) -> DeltaCoding:
    """The coding of that name; UnsupportedFeatureError when this release has none."""
    known = codings()
    if name not in known:
        raise UnsupportedFeatureError(f"unknown coding {name!r}; this release knows {sorted(known)}", feature=name)
    return known[name]
