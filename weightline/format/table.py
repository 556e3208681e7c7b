"""The table of a payload: the segments that it covers and the chunks that hold them, as varints in raw deflate.

    table   = deflate( num_segments segment* num_chunks chunk* )
    segment = shared suffix_nbytes suffix dtype ndim dim* is_whole [start length]
    chunk   = dtype num_elements num_changed positions_nbytes steps_nbytes

Numbers are unsigned LEB128. `shared` is how many bytes of the previous name this one starts with; dtype is an index
into `weightline.dtypes.DTYPES`. A chunk covers the next num_elements elements of the line of its dtype: all segments of
that dtype laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightline.codec.varint import NumberReader, put_numbers
from weightline.errors import PayloadError
from weightline.format.specs import SpecReader, SpecWriter, deflated, dtype_number, inflated, read_dtype
from weightline.types import Segment

#: Bounds that a reader accepts: bytes of an inflated table, segments, chunks, bytes of a name.
MAX_TABLE_NBYTES = 1 << 23
MAX_SEGMENTS = 1 << 18
MAX_CHUNKS = 1 << 18


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One chunk: a run of its dtype's line and the bytes of its two streams (an anchor's chunk has only the first)."""

    dtype: str
    num_elements: int
    num_changed: int
    stream_nbytes: tuple[int, int]


def pack_table(segments: Sequence[Segment], chunks: Sequence[ChunkEntry]) -> bytes:
    """Returns the table's bytes. PayloadError for a table that is too large for any reader."""
    out = bytearray()
    put_numbers(out, len(segments))
    specs = SpecWriter(out)
    for segment in segments:
        specs.put(segment.tensor)
        is_whole = segment.start == 0 and segment.length == segment.tensor.num_elements
        put_numbers(out, *((1,) if is_whole else (0, segment.start, segment.length)))
    put_numbers(out, len(chunks))
    for chunk in chunks:
        put_numbers(out, dtype_number(chunk.dtype), chunk.num_elements, chunk.num_changed, *chunk.stream_nbytes)
    if len(out) > MAX_TABLE_NBYTES or len(chunks) > MAX_CHUNKS:
        raise PayloadError(
            f"{len(segments)} segments and {len(chunks)} chunks take a table of {len(out)} bytes, and readers accept "
            f"{MAX_TABLE_NBYTES} bytes and {MAX_CHUNKS} chunks: write several payloads, or choose shorter tensor names",
            rule="table-deflate",
        )
    return deflated(bytes(out))


def unpack_table(stream: bytes) -> tuple[tuple[Segment, ...], tuple[ChunkEntry, ...]]:
    """Returns the segments and chunks of a table. Inflates at most MAX_TABLE_NBYTES. PayloadError for a broken one."""
    raw = inflated(stream, MAX_TABLE_NBYTES)
    reader = NumberReader(raw, "table-number")
    specs = SpecReader(reader)
    segments = [_read_segment(reader, specs) for _ in range(_count(reader, MAX_SEGMENTS))]
    chunks = tuple(_read_chunk(reader) for _ in range(_count(reader, MAX_CHUNKS)))
    if reader.rest():
        raise PayloadError("the table has trailing bytes", rule="table-trailing")
    return tuple(segments), chunks


def _count(reader: NumberReader, limit: int) -> int:
    count = reader.number()
    if count > limit:
        raise PayloadError(f"the table claims {count} entries; at most {limit} are read", rule="table-count")
    return count


def _read_segment(reader: NumberReader, specs: SpecReader) -> Segment:
    tensor = specs.read()
    flag = reader.number()
    if flag > 1:
        raise PayloadError(f"{tensor.name!r} has flag {flag}", rule="table-flag")
    start, length = (0, tensor.num_elements) if flag else (reader.number(), reader.number())
    if start + length > tensor.num_elements:
        raise PayloadError(f"a segment of {tensor.name!r} ends beyond it", rule="segment-range")
    return Segment(tensor, start, length)


def _read_chunk(reader: NumberReader) -> ChunkEntry:
    return ChunkEntry(read_dtype(reader), reader.number(), reader.number(), (reader.number(), reader.number()))
