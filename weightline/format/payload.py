"""Payloads: the bytes of one shard of a version. A safetensors file; SPEC.md sections Payload, Codings and Edge cases.

Written and read in chunks, so memory is bounded for tensors of any size. The same input gives the same bytes. A reader
checks counts, bounds and order before it allocates what the file claims, and raises PayloadError(rule=...) for any
violation.

Legend: N elements of a segment, K changed elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from weightline.codec.anchor import ANCHOR_CODING, decode_anchor, encode_anchor
from weightline.codec.capture import check_bits
from weightline.codec.coding import ChunkBase, DeltaCoding, coding_named
from weightline.codec.parallel import ordered_map
from weightline.codec.pieces import cut, num_tiles, tiles_of
from weightline.errors import InputError, PayloadError, UnsupportedFeatureError
from weightline.format.envelope import Echo, read_envelope, reserve_header, write_header
from weightline.format.layout import (
    CHUNK_CHANGED,
    CHUNK_ELEMENTS,
    MAX_CHUNK_ELEMENTS,
    MAX_CHUNK_PIECES,
    PlacedChunk,
    check_segments,
    place_chunks,
)
from weightline.format.table import ChunkEntry, pack_table, unpack_table
from weightline.types import BitsArray, Changes, Segment, bits_dtype

Select = Callable[[Segment], bool]
Base = Callable[[Segment], BitsArray]

FORMAT = "1"


@dataclass(frozen=True, slots=True)
class PayloadInfo:
    """What was written: facts for the manifest."""

    nbytes: int
    sha256: str
    num_changed: int
    num_elements: int
    kind: str
    coding: str
    num_segments: int


def write_delta(path: Path, changes: Iterable[Changes], coding: str = "gap", *, num_threads: int = 1) -> PayloadInfo:
    """Write a delta's payload, one segment after the other; every segment given is listed, changed or not.

    Overwrites `path`; a crash leaves a file that no reader accepts. Safe to repeat: same input, same bytes, whatever
    the number of threads. Raises UnsupportedFeatureError for an unknown coding, InputError for changes that
    lack ranks and for segments that overlap.
    """
    encoder = coding_named(coding)
    with path.open("wb") as file:
        writer = _Writer(file, "delta", coding)
        chunks = _gather(writer.listed(changes))
        for streams, entry in ordered_map(partial(_encode_chunk, encoder), chunks, num_threads):
            writer.put_chunk(entry, *streams)
        return writer.finish(path)


def write_anchor(path: Path, segments: Iterable[tuple[Segment, BitsArray]], *, num_threads: int = 1) -> PayloadInfo:
    """Write an anchor's payload. Overwrites `path`; a crash leaves a file that no reader accepts. Safe to repeat.

    Raises InputError when an array does not have its segment's length and width.
    """
    with path.open("wb") as file:
        writer = _Writer(file, "anchor", ANCHOR_CODING)
        tiles = _anchor_tiles(writer, segments)
        for stream, entry in ordered_map(_encode_tile, tiles, num_threads):
            writer.put_chunk(entry, stream)
        return writer.finish(path)


def _gather(changes: Iterable[Changes]) -> Iterator[_OpenChunk]:
    """Pieces gathered into chunks; each dtype has a line of its own."""
    open_chunks: dict[str, _OpenChunk] = {}
    for change in changes:
        for piece in cut(change):
            dtype = piece.segment.tensor.dtype
            chunk = open_chunks.get(dtype)
            if chunk is None:
                chunk = open_chunks[dtype] = _OpenChunk()
            chunk.add(piece)
            if chunk.is_full:
                yield open_chunks.pop(dtype)
    yield from open_chunks.values()


@dataclass(slots=True)
class _OpenChunk:
    """Pieces of one dtype that will be coded together."""

    pieces: list[Changes] = field(default_factory=list)
    num_elements: int = 0
    num_changed: int = 0

    def add(self, piece: Changes) -> None:
        self.pieces.append(piece)
        self.num_elements += piece.segment.length
        self.num_changed += piece.num_changed

    @property
    def is_full(self) -> bool:
        if self.num_elements >= MAX_CHUNK_ELEMENTS or len(self.pieces) >= MAX_CHUNK_PIECES:
            return True
        return self.num_elements >= CHUNK_ELEMENTS and self.num_changed >= CHUNK_CHANGED


def _encode_chunk(encoder: DeltaCoding, chunk: _OpenChunk) -> tuple[tuple[bytes, bytes], ChunkEntry]:
    streams = encoder.encode(chunk.pieces)
    lengths = (len(streams[0]), len(streams[1]))
    dtype = chunk.pieces[0].segment.tensor.dtype
    return streams, ChunkEntry(dtype, chunk.num_elements, chunk.num_changed, lengths)


def _anchor_tiles(
    writer: _Writer, segments: Iterable[tuple[Segment, BitsArray]]
) -> Iterator[tuple[Segment, BitsArray]]:
    for segment, bits_N in segments:
        writer.segments.append(segment)
        check_bits(segment, bits_N)
        for tile in tiles_of(segment):
            at = tile.start - segment.start
            yield tile, bits_N[at : at + tile.length]


def _encode_tile(tile_bits: tuple[Segment, BitsArray]) -> tuple[bytes, ChunkEntry]:
    tile, bits_N = tile_bits
    stream = encode_anchor(bits_N, tile.tensor.dtype)
    return stream, ChunkEntry(tile.tensor.dtype, tile.length, tile.length, (len(stream), 0))


@dataclass(slots=True)
class _Writer:
    """The file being written, and what its table will say."""

    file: BinaryIO
    kind: str
    coding: str
    segments: list[Segment] = field(default_factory=list)
    chunks: list[ChunkEntry] = field(default_factory=list)
    echo: Echo = field(default_factory=Echo)

    def __post_init__(self) -> None:
        reserve_header(self.file)

    def listed(self, changes: Iterable[Changes]) -> Iterator[Changes]:
        """Enter every segment that passes."""
        for change in changes:
            self.segments.append(change.segment)
            yield change

    def put_chunk(self, entry: ChunkEntry, *streams: bytes) -> None:
        self.chunks.append(entry)
        self._write(*streams)

    def finish(self, path: Path) -> PayloadInfo:
        _require_valid(self.segments)
        table = pack_table(self.segments, self.chunks)
        chunks_nbytes = self.echo.nbytes
        self._write(table)
        metadata = {"weightline": FORMAT, "kind": self.kind, "coding": self.coding}
        header = write_header(self.file, metadata, chunks_nbytes, len(table))
        self.file.flush()
        num_changed = sum(chunk.num_changed for chunk in self.chunks)
        num_elements = sum(segment.length for segment in self.segments)
        nbytes, sha256 = len(header) + self.echo.nbytes, self.echo.sha256_after(header, path)
        return PayloadInfo(nbytes, sha256, num_changed, num_elements, self.kind, self.coding, len(self.segments))

    def _write(self, *parts: bytes) -> None:
        self.file.writelines(parts)
        self.echo.add(*parts)


def _require_valid(segments: Sequence[Segment]) -> None:
    """What a reader would refuse, a writer refuses."""
    try:
        check_segments(segments)
    except PayloadError as error:
        raise InputError(str(error), **error.facts) from error


@dataclass(frozen=True, slots=True)
class Payload:
    """An opened payload: header and table are checked; streams are read when asked for."""

    path: Path
    kind: str
    coding: str
    segments: tuple[Segment, ...]
    num_changed: int
    _lines: Mapping[str, tuple[PlacedChunk, ...]]

    def read_changes(self, select: Select | None, base: Base, *, num_threads: int = 1) -> Iterator[Changes]:
        """The changes of every selected segment (None: all of them), one Changes a segment, in the table's order.

        `base` gives a segment's bits before this delta; only selected segments that are not empty are asked for (on
        worker threads, ahead of what is yielded, when there are several). Whoever applies changes while iterating may
        write to segments that were yielded. Raises PayloadError; what was yielded before is sound.
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
        """The bits of every selected segment (None: all of them), in the table's order. Raises PayloadError."""
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
    """Open a payload and check its header and table. Reads no stream. Raises PayloadError, UnsupportedFeatureError."""
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
    if metadata.get("weightline") != FORMAT:
        found = metadata.get("weightline")
        raise UnsupportedFeatureError(
            f"payload format {found!r}; this release reads {FORMAT!r}", feature="payload-format"
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
    """One stream, with something in it: a tile of nothing would let a few bytes claim any number of elements."""
    entry = chunk.entry
    first_nbytes, second_nbytes = entry.stream_nbytes
    if len(chunk.pieces) > 1 or entry.num_changed != entry.num_elements or second_nbytes or not first_nbytes:
        raise PayloadError("an anchor's chunk is one tile, all of it, in one stream", rule="anchor-chunk")


class _Bases:
    """Base bits by segment; remembers the last segment asked for, since a large segment has many pieces."""

    def __init__(self, segments: Sequence[Segment], select: Select, base: Base) -> None:
        self._segments = segments
        self._base = base
        self._last: tuple[int, BitsArray] | None = None
        self.wanted = [select(segment) for segment in segments]

    def of_chunk(self, chunk: PlacedChunk) -> ChunkBase:
        return ChunkBase([self.wanted[owner] for owner in chunk.owners], partial(self._bits, chunk))

    def _bits(self, chunk: PlacedChunk, number: int) -> BitsArray:
        owner, piece = chunk.owners[number], chunk.pieces[number]
        segment = self._segments[owner]
        held = self._last
        if held is None or held[0] != owner:
            held = self._last = (owner, np.ascontiguousarray(check_bits(segment, self._base(segment))))
        at = piece.start - segment.start
        return held[1][at : at + piece.length]


def _delta_pieces(
    file: BinaryIO, chunks: Sequence[PlacedChunk], coding: DeltaCoding, bases: _Bases, num_threads: int
) -> Iterator[Changes]:
    wanted = ((chunk, _read_streams(file, chunk)) for chunk in chunks if any(bases.of_chunk(chunk).wanted))

    def decode(item: tuple[PlacedChunk, tuple[bytes, bytes]]) -> list[Changes]:
        chunk, streams = item
        return list(coding.decode(streams, chunk.pieces, chunk.entry.num_changed, bases.of_chunk(chunk)))

    for pieces in ordered_map(decode, wanted, num_threads):
        yield from pieces


def _read_streams(file: BinaryIO, chunk: PlacedChunk) -> tuple[bytes, bytes]:
    file.seek(chunk.offset)
    first, second = (file.read(nbytes) for nbytes in chunk.entry.stream_nbytes)
    return first, second


def _join_changes(segment: Segment, pieces: list[Changes]) -> Changes:
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
