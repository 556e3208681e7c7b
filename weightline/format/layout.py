"""Computes the offsets of a payload's chunks and the elements that they cover. Pure. Checks before any allocation.

Each dtype of a payload has a line: the tiles of all its segments, in the table's order, laid end to end. A chunk is the
next run of tiles of its dtype's line; its streams are the next bytes of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from weightline.codec.pieces import TILE, num_tiles, tiles_of
from weightline.errors import PayloadError
from weightline.format.table import MAX_SEGMENTS, ChunkEntry
from weightline.types import MAX_NAME_NBYTES, Segment, TensorSpec

#: A writer closes a chunk at the first piece with which it has CHUNK_ELEMENTS elements, of which CHUNK_CHANGED changed.
CHUNK_ELEMENTS = 1 << 23
CHUNK_CHANGED = 1 << 14
#: A writer also closes a chunk at this many elements or pieces, regardless of the number of changes.
MAX_CHUNK_ELEMENTS = 1 << 28
MAX_CHUNK_PIECES = 1 << 10
#: A reader accepts the most changed elements that a writer can put into one chunk.
MAX_CHUNK_CHANGED = CHUNK_ELEMENTS + TILE
#: A reader accepts this many tiles of all segments of a payload: about 10**12 elements.
MAX_TILES = 1 << 18


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk with the offset of its streams in the file, and its pieces with the number of the segment of each."""

    entry: ChunkEntry
    offset: int
    owners: tuple[int, ...]
    pieces: tuple[Segment, ...]


def check_segments(segments: Sequence[Segment]) -> None:
    """Raises PayloadError for too many segments, for overlapping ones, and for two tensors of one name."""
    if len(segments) > MAX_SEGMENTS or sum(num_tiles(segment) for segment in segments) > MAX_TILES:
        raise PayloadError(f"{len(segments)} segments are more than a payload may have", rule="segment-count")
    tensors: dict[str, TensorSpec] = {}
    for segment in segments:
        if _name_nbytes(segment.tensor.name) > MAX_NAME_NBYTES:
            raise PayloadError(f"the name {segment.tensor.name[:50]!r}... is too long", rule="table-name")
        if tensors.setdefault(segment.tensor.name, segment.tensor) != segment.tensor:
            raise PayloadError(f"{segment.tensor.name!r} names two tensors", rule="segment-tensor")
    held = sorted((s.tensor.name, s.start, s.stop) for s in segments if s.length)
    for (name, _, stop), (next_name, start, _) in pairwise(held):
        if name == next_name and start < stop:
            raise PayloadError(f"two segments of {name!r} overlap at element {start}", rule="segment-overlap")


def _name_nbytes(name: str) -> int:
    try:
        return len(name.encode())
    except UnicodeEncodeError as error:
        raise PayloadError(f"the name {name[:50]!r} is no text: UTF-8 cannot write it", rule="table-name") from error


def place_chunks(
    segments: Sequence[Segment], entries: Sequence[ChunkEntry], start: int, end: int
) -> dict[str, tuple[PlacedChunk, ...]]:
    """Returns the chunks of every dtype's line, whose streams fill the bytes [start, end). PayloadError."""
    check_segments(segments)
    tiles = {dtype: _line(segments, dtype) for dtype in sorted({segment.tensor.dtype for segment in segments})}
    lines: dict[str, list[PlacedChunk]] = {dtype: [] for dtype in tiles}
    for entry in entries:
        placed = _place(entry, start, tiles.get(entry.dtype, iter(())))
        start += sum(entry.stream_nbytes)
        if start > end:
            raise PayloadError("a chunk's streams end beyond the chunks", rule="chunk-bytes")
        lines[entry.dtype].append(placed)
    if start != end:
        raise PayloadError("there are bytes between the chunks and the table", rule="chunk-bytes")
    if any(next(rest, None) is not None for rest in tiles.values()):
        raise PayloadError("a segment is not covered by the chunks", rule="chunk-cover")
    return {dtype: tuple(line) for dtype, line in lines.items()}


def _line(segments: Sequence[Segment], dtype: str) -> Iterator[tuple[int, Segment]]:
    for number, segment in enumerate(segments):
        if segment.tensor.dtype == dtype:
            for tile in tiles_of(segment):
                yield number, tile


def _place(entry: ChunkEntry, offset: int, tiles: Iterator[tuple[int, Segment]]) -> PlacedChunk:
    owners: list[int] = []
    pieces: list[Segment] = []
    room = entry.num_elements
    while room > 0 and len(pieces) < MAX_CHUNK_PIECES:
        owner, tile = next(tiles, (-1, None))
        if tile is None or tile.length > room:
            raise PayloadError("a chunk does not end where a tile does", rule="chunk-cover")
        owners.append(owner)
        pieces.append(tile)
        room -= tile.length
    if room or not pieces:
        raise PayloadError(
            f"a chunk of {entry.num_elements} elements has too many pieces, or none", rule="chunk-pieces"
        )
    if entry.num_changed > min(entry.num_elements, MAX_CHUNK_CHANGED):
        raise PayloadError(f"a chunk claims {entry.num_changed} changes of {entry.num_elements}", rule="chunk-count")
    return PlacedChunk(entry, offset, tuple(owners), tuple(pieces))
