"""Reads payloads: the bytes of one shard of a version. SPEC.md sections Payload, Codings and Edge cases.

Payloads are read in chunks, so memory is bounded for tensors of any size. A reader checks counts, bounds and order
before it allocates what the file claims, and raises PayloadError(rule=...) for any violation.

Legend: N elements of a segment, K changed elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np

from weightline.codec.anchor import ANCHOR_CODING, decode_anchor
from weightline.codec.capture import check_bits
from weightline.codec.coding import ChunkBase, DeltaCoding, coding_named, ordered_map
from weightline.codec.pieces import num_tiles
from weightline.dtypes import bits_dtype
from weightline.errors import PayloadError, UnsupportedFeatureError
from weightline.format.envelope import read_envelope
from weightline.format.layout import (
    PlacedChunk,
    place_chunks,
)
from weightline.format.table import unpack_table
from weightline.types import BitsArray, Changes, Segment

Select = Callable[[Segment], bool]

Base = Callable[[Segment], BitsArray]

PAYLOAD_FORMAT = "1"


@dataclass(frozen=True, slots=True)
class Payload:
    """An opened payload. Header and table are checked; streams are read on demand."""

    path: Path
    kind: str
    coding: str
    segments: tuple[Segment, ...]
    num_changed: int
    _lines: Mapping[str, tuple[PlacedChunk, ...]]

    def read_changes(self, select: Select | None, base: Base, *, num_threads: int = 1) -> Iterator[Changes]:
        """Yields the changes of every selected segment (None: all), one Changes per segment, in the table's order.

        `base` returns a segment's bits before this delta. It is called once for each selected segment that is not
        empty, one call at a time, with several threads on worker threads and ahead of the yielded segments. A caller
        that applies changes while iterating may write to segments that were yielded. After PayloadError, changes
        yielded before are valid.
        """
        self._require("delta")
        coding = coding_named(self.coding)
        with self.path.open("rb") as file:
            bases = _Bases(self.segments, select or _everything, base)
            lines = {
                dtype: _delta_pieces(file, chunks, coding, bases, num_threads) for dtype, chunks in self._lines.items()
            }
            for segment, is_wanted in zip(self.segments, bases.wanted, strict=True):
                if is_wanted:
                    pieces = lines.get(segment.tensor.dtype, iter(()))
                    yield _join_changes(segment, list(islice(pieces, num_tiles(segment))))

    def read_anchor(self, select: Select | None, *, num_threads: int = 1) -> Iterator[tuple[Segment, BitsArray]]:
        """Yields the bits of every selected segment (None: all), in the table's order. PayloadError."""
        self._require("anchor")
        with self.path.open("rb") as file:
            lines = {dtype: iter(chunks) for dtype, chunks in self._lines.items()}
            for segment in self.segments:
                chunks = list(islice(lines.get(segment.tensor.dtype, iter(())), num_tiles(segment)))
                if (select or _everything)(segment):
                    yield segment, _join_tiles(file, segment, chunks, num_threads)

    def _require(self, kind: str) -> None:
        if self.kind != kind:
            raise PayloadError(f"{self.path.name} holds a payload of kind {self.kind!r}, not {kind!r}", rule="kind")


def open_payload(path: Path) -> Payload:
    """Opens a payload and checks its header and table. Reads no stream. PayloadError, UnsupportedFeatureError."""
    with path.open("rb") as file:
        envelope = read_envelope(file, path.stat().st_size)
        kind, coding = _read_metadata(envelope.metadata)
        file.seek(envelope.table_start)
        segments, chunks = unpack_table(file.read(envelope.nbytes - envelope.table_start))
    lines = place_chunks(segments, chunks, envelope.chunks_start, envelope.table_start)
    if kind == "anchor":
        for line in lines.values():
            for chunk in line:
                _check_tile(chunk)
    return Payload(path, kind, coding, segments, sum(chunk.num_changed for chunk in chunks), lines)


def _read_metadata(metadata: Mapping[str, str]) -> tuple[str, str]:
    if metadata.get("weightline") != PAYLOAD_FORMAT:
        found = metadata.get("weightline")
        raise UnsupportedFeatureError(
            f"payload format {found!r}; this release reads {PAYLOAD_FORMAT!r}", feature="payload-format"
        )
    kind, coding = metadata.get("kind", ""), metadata.get("coding", "")
    if kind == "delta":
        coding_named(coding)
    elif kind == "anchor" and coding != ANCHOR_CODING:
        raise UnsupportedFeatureError(f"unknown anchor coding {coding!r}", feature=coding)
    elif kind != "anchor":
        raise PayloadError(f"unknown kind {kind!r}", rule="kind")
    return kind, coding


def _check_tile(chunk: PlacedChunk) -> None:
    """Raises PayloadError unless an anchor's chunk is one tile in one stream that is not empty.

    With empty streams, a few bytes could claim any number of elements.
    """
    entry = chunk.entry
    first_nbytes, second_nbytes = entry.stream_nbytes
    if len(chunk.pieces) > 1 or entry.num_changed != entry.num_elements or second_nbytes or not first_nbytes:
        raise PayloadError("an anchor's chunk is one tile, all of it, in one stream", rule="anchor-chunk")


class _Bases:
    """The base bits of segments. It keeps a segment's bits until all of its pieces were asked for. Safe for threads."""

    def __init__(self, segments: Sequence[Segment], select: Select, base: Base) -> None:
        self._segments = segments
        self._base = base
        self._reading = Lock()
        self._held: dict[int, tuple[BitsArray, int]] = {}
        self.wanted = [select(segment) for segment in segments]

    def of_chunk(self, chunk: PlacedChunk) -> ChunkBase:
        return ChunkBase([self.wanted[owner] for owner in chunk.owners], partial(self._bits, chunk))

    def _bits(self, chunk: PlacedChunk, number: int) -> BitsArray:
        owner, piece = chunk.owners[number], chunk.pieces[number]
        segment = self._segments[owner]
        with self._reading:
            bits_N, num_pieces_left = self._held.pop(owner, (None, num_tiles(segment)))
            if bits_N is None:
                bits_N = np.ascontiguousarray(check_bits(segment, self._base(segment)))
            if num_pieces_left > 1:
                self._held[owner] = bits_N, num_pieces_left - 1
        at = piece.start - segment.start
        return bits_N[at : at + piece.length]


def _delta_pieces(
    file: BinaryIO, chunks: Sequence[PlacedChunk], coding: DeltaCoding, bases: _Bases, num_threads: int
) -> Iterator[Changes]:
    wanted = ((chunk, _read_streams(file, chunk)) for chunk in chunks if any(bases.of_chunk(chunk).wanted))

    def decode(item: tuple[PlacedChunk, tuple[bytes, bytes]]) -> list[Changes]:
        chunk, streams = item
        return list(coding.decode(streams, chunk.pieces, chunk.entry.num_changed, bases.of_chunk(chunk)))

    for pieces in ordered_map(decode, wanted, min(num_threads, len(chunks))):
        yield from pieces


def _read_streams(file: BinaryIO, chunk: PlacedChunk) -> tuple[bytes, bytes]:
    file.seek(chunk.offset)
    first, second = (file.read(nbytes) for nbytes in chunk.entry.stream_nbytes)
    return first, second


def _join_changes(segment: Segment, pieces: list[Changes]) -> Changes:
    if len(pieces) == 1 and pieces[0].segment == segment:
        return pieces[0]
    bits = bits_dtype(segment.tensor.dtype)
    positions = [piece.positions_K + (piece.segment.start - segment.start) for piece in pieces]
    return Changes(
        segment,
        np.concatenate([np.zeros(0, np.int64), *positions]),
        np.concatenate([np.zeros(0, bits), *(piece.old_K for piece in pieces)]),
        np.concatenate([np.zeros(0, bits), *(piece.new_K for piece in pieces)]),
    )


def _join_tiles(file: BinaryIO, segment: Segment, chunks: list[PlacedChunk], num_threads: int) -> BitsArray:
    bits_N = np.empty(segment.length, bits_dtype(segment.tensor.dtype))

    def decode(item: tuple[Segment, bytes]) -> None:
        tile, stream = item
        at = tile.start - segment.start
        bits_N[at : at + tile.length] = decode_anchor(stream, tile.length, tile.tensor.dtype)

    streams = ((chunk.pieces[0], _read_streams(file, chunk)[0]) for chunk in chunks)
    for _ in ordered_map(decode, streams, num_threads):
        pass
    return bits_N


def _everything(_: Segment) -> bool:
    return True
