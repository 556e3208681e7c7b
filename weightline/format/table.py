"""The table of a payload: the segments that it covers and the chunks that hold them, as varints in raw deflate.

    table   = deflate( num_segments segment* num_chunks chunk* )
    segment = shared suffix_nbytes suffix dtype ndim dim* is_whole [start length]
    chunk   = dtype num_elements num_changed positions_nbytes steps_nbytes

Numbers are unsigned LEB128. `shared` is how many bytes of the previous name this one starts with; dtype is an index
into `weightline.dtypes.DTYPES`. A chunk covers the next num_elements elements of the line of its dtype: all segments of
that dtype laid end to end.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from weightline.codec.varint import NumberReader, put_numbers
from weightline.dtypes import DTYPES
from weightline.errors import PayloadError
from weightline.types import MAX_NAME_NBYTES, MAX_NDIM, Segment, TensorSpec, is_shape_in_range

#: Bounds that a reader accepts: bytes of an inflated table, segments, chunks, bytes of a name.
MAX_TABLE_NBYTES = 1 << 23
MAX_SEGMENTS = 1 << 18
MAX_CHUNKS = 1 << 18
_DTYPE_CODES = tuple(DTYPES)


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
    previous = b""
    for segment in segments:
        tensor = segment.tensor
        name = tensor.name.encode()
        shared = _shared_prefix(previous, name)
        put_numbers(out, shared, len(name) - shared)
        out += name[shared:]
        is_whole = segment.start == 0 and segment.length == tensor.num_elements
        span = (1,) if is_whole else (0, segment.start, segment.length)
        put_numbers(out, _DTYPE_CODES.index(tensor.dtype), len(tensor.shape), *tensor.shape, *span)
        previous = name
    put_numbers(out, len(chunks))
    for chunk in chunks:
        put_numbers(out, _DTYPE_CODES.index(chunk.dtype), chunk.num_elements, chunk.num_changed, *chunk.stream_nbytes)
    if len(out) > MAX_TABLE_NBYTES or len(chunks) > MAX_CHUNKS:
        raise PayloadError(
            f"{len(segments)} segments and {len(chunks)} chunks take a table of {len(out)} bytes, and readers accept "
            f"{MAX_TABLE_NBYTES} bytes and {MAX_CHUNKS} chunks: write several payloads, or choose shorter tensor names",
            rule="table-deflate",
        )
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(bytes(out)) + deflate.flush()


def unpack_table(stream: bytes) -> tuple[tuple[Segment, ...], tuple[ChunkEntry, ...]]:
    """Returns the segments and chunks of a table. Inflates at most MAX_TABLE_NBYTES. PayloadError for a broken one."""
    inflate = zlib.decompressobj(-15)
    try:
        raw = inflate.decompress(stream, MAX_TABLE_NBYTES)
    except zlib.error as error:
        raise PayloadError(f"the table does not inflate: {error}", rule="table-deflate") from error
    if not inflate.eof or inflate.unused_data:
        raise PayloadError("the table is truncated, too large, or followed by more bytes", rule="table-deflate")
    reader = NumberReader(raw, "table-number")
    segments: list[Segment] = []
    name = b""
    for _ in range(_count(reader, MAX_SEGMENTS)):
        name = _name(reader, name)
        segments.append(_read_segment(reader, name))
    chunks = tuple(_read_chunk(reader) for _ in range(_count(reader, MAX_CHUNKS)))
    if reader.rest():
        raise PayloadError("the table has trailing bytes", rule="table-trailing")
    return tuple(segments), chunks


def _count(reader: NumberReader, limit: int) -> int:
    count = reader.number()
    if count > limit:
        raise PayloadError(f"the table claims {count} entries; at most {limit} are read", rule="table-count")
    return count


def _read_segment(reader: NumberReader, name: bytes) -> Segment:
    try:
        text = name.decode()
    except UnicodeDecodeError as error:
        raise PayloadError("a tensor's name is not UTF-8", rule="table-name") from error
    dtype = _dtype(reader)
    ndim = reader.number()
    if ndim > MAX_NDIM:
        raise PayloadError(f"{text!r} has {ndim} dimensions", rule="table-shape")
    tensor = TensorSpec(text, dtype, tuple(reader.number() for _ in range(ndim)))
    if not is_shape_in_range(tensor.shape):
        raise PayloadError(f"{text!r} has the shape {tensor.shape}", rule="table-shape")
    flag = reader.number()
    if flag > 1:
        raise PayloadError(f"{text!r} has flag {flag}", rule="table-flag")
    start, length = (0, tensor.num_elements) if flag else (reader.number(), reader.number())
    if start + length > tensor.num_elements:
        raise PayloadError(f"a segment of {text!r} ends beyond it", rule="segment-range")
    return Segment(tensor, start, length)


def _read_chunk(reader: NumberReader) -> ChunkEntry:
    return ChunkEntry(_dtype(reader), reader.number(), reader.number(), (reader.number(), reader.number()))


def _name(reader: NumberReader, previous: bytes) -> bytes:
    shared, count = reader.number(), reader.number()
    if shared > len(previous) or count > MAX_NAME_NBYTES:
        raise PayloadError("a name shares more bytes than the previous one has, or is too long", rule="table-name")
    return previous[:shared] + reader.take(count)


def _dtype(reader: NumberReader) -> str:
    code = reader.number()
    if code >= len(_DTYPE_CODES):
        raise PayloadError(f"unknown dtype code {code}", rule="table-dtype")
    return _DTYPE_CODES[code]


def _shared_prefix(a: bytes, b: bytes) -> int:
    limit = min(len(a), len(b))
    differing = int.from_bytes(a[:limit], "big") ^ int.from_bytes(b[:limit], "big")
    return limit - (differing.bit_length() + 7) // 8
