"""Writes payloads: the bytes of one shard of a version. SPEC.md sections Payload, Codings and Edge cases.

Payloads are written in chunks, so memory is bounded for tensors of any size. The same input gives the same bytes.

Legend: N elements of a segment, K changed elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from weightline.codec.anchor import ANCHOR_CODING, encode_anchor
from weightline.codec.capture import check_bits
from weightline.codec.coding import DeltaCoding, coding_named, ordered_map
from weightline.codec.pieces import cut, tiles_of
from weightline.errors import InputError, PayloadError
from weightline.format.envelope import ECHO_NBYTES, Echo, reserve_header, write_header
from weightline.format.layout import (
    CHUNK_CHANGED,
    CHUNK_ELEMENTS,
    MAX_CHUNK_ELEMENTS,
    MAX_CHUNK_PIECES,
    check_segments,
)
from weightline.format.payload import PAYLOAD_FORMAT
from weightline.format.table import ChunkEntry, pack_table
from weightline.types import BitsArray, Changes, Segment, is_shape_in_range


@dataclass(frozen=True, slots=True)
class PayloadInfo:
    """The facts of a written payload, for the manifest."""

    nbytes: int
    sha256: str
    num_changed: int
    num_elements: int
    kind: str
    coding: str
    num_segments: int


def write_delta(path: Path, changes: Iterable[Changes], coding: str = "gap", *, num_threads: int = 1) -> PayloadInfo:
    """Writes a delta's payload, one segment after the other. Every given segment is listed, changed or not.

    Overwrites `path`; a crash leaves a file that no reader accepts. Safe to repeat: the same input gives the same bytes
    for any number of threads. UnsupportedFeatureError for an unknown coding; InputError for changes without ranks and
    for segments that overlap.
    """
    encoder = coding_named(coding)
    with path.open("wb") as file:
        writer = _Writer(file, "delta", coding)
        chunks = _gather(writer.listed(changes))
        for streams, entry in ordered_map(partial(_encode_chunk, encoder), chunks, num_threads):
            writer.put_chunk(entry, *streams)
        return writer.finish(path)


def write_anchor(
    path: Path, segments: Iterable[tuple[Segment, BitsArray]], *, num_threads: int = 1, echo_nbytes: int = ECHO_NBYTES
) -> PayloadInfo:
    """Writes an anchor's payload. Overwrites `path`; a crash leaves a file that no reader accepts. Safe to repeat.

    A payload of at most `echo_nbytes` is hashed from memory, a larger one from the file. InputError when an array does
    not have its segment's length and width.
    """
    with path.open("wb") as file:
        writer = _Writer(file, "anchor", ANCHOR_CODING, echo=Echo(echo_nbytes))
        tiles = _anchor_tiles(writer, segments)
        for stream, entry in ordered_map(_encode_tile, tiles, num_threads):
            writer.put_chunk(entry, stream)
        return writer.finish(path)


def _gather(changes: Iterable[Changes]) -> Iterator[_OpenChunk]:
    """Yields the pieces gathered into chunks. Each dtype has a line of its own."""
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
    """Writes a payload's file, and collects the entries of its table."""

    file: BinaryIO
    kind: str
    coding: str
    segments: list[Segment] = field(default_factory=list)
    chunks: list[ChunkEntry] = field(default_factory=list)
    echo: Echo = field(default_factory=Echo)

    def __post_init__(self) -> None:
        reserve_header(self.file)

    def listed(self, changes: Iterable[Changes]) -> Iterator[Changes]:
        """Adds the segment of every change that passes to the table."""
        for change in changes:
            self.segments.append(change.segment)
            yield change

    def put_chunk(self, entry: ChunkEntry, *streams: bytes) -> None:
        self.chunks.append(entry)
        self._write(*streams)

    def finish(self, path: Path) -> PayloadInfo:
        table = _packed(self.segments, self.chunks)
        chunks_nbytes = self.echo.nbytes
        self._write(table)
        metadata = {"weightline": PAYLOAD_FORMAT, "kind": self.kind, "coding": self.coding}
        header = write_header(self.file, metadata, chunks_nbytes, len(table))
        self.file.flush()
        num_changed = sum(chunk.num_changed for chunk in self.chunks)
        num_elements = sum(segment.length for segment in self.segments)
        nbytes, sha256 = len(header) + self.echo.nbytes, self.echo.sha256_after(header, path)
        return PayloadInfo(nbytes, sha256, num_changed, num_elements, self.kind, self.coding, len(self.segments))

    def _write(self, *parts: bytes) -> None:
        self.file.writelines(parts)
        self.echo.add(*parts)


def _packed(segments: Sequence[Segment], chunks: Sequence[ChunkEntry]) -> bytes:
    """Returns the table. InputError, before anything is uploaded, for segments that a reader would refuse."""
    for segment in segments:
        tensor = segment.tensor
        if not is_shape_in_range(tensor.shape):
            raise InputError(f"{tensor.name!r} has the shape {tensor.shape}, which no chain holds", tensor=tensor.name)
        if not 0 <= segment.start <= segment.stop <= tensor.num_elements:
            raise InputError(f"a segment of {tensor.name!r} ends beyond it", tensor=tensor.name)
    try:
        check_segments(segments)
        return pack_table(segments, chunks)
    except PayloadError as error:
        raise InputError(str(error), **error.facts) from error
