"""Codes anchors: full bits of a tile as ordered integers, losslessly, by pcodec (https://github.com/pcodec/pcodec).

pcodec finds bins of the distribution and codes them with tANS. That suits full states, whose distribution is unknown.
The distribution of a delta's gaps and steps is known: see geometric.py and rice.py. Mode and delta order are fixed, so
that the same numbers always give the same bytes.

Legend: N elements of the tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from weightline.codec.steps import from_ordered, to_ordered
from weightline.dtypes import DTYPES, bits_dtype
from weightline.errors import PayloadError
from weightline.types import BitsArray

#: Name of the anchors' coding in payloads.
ANCHOR_CODING = "ordered-pco"

#: pcodec is faster on 32-bit numbers than on narrower ones, at no loss of compression.
_MIN_ITEMSIZE = 4

_CONFIG = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())


def encode_anchor(bits_N: BitsArray, dtype: str) -> bytes:
    """Returns the coded stream of a tile's bits. Pure."""
    ordered_N = to_ordered(bits_N, dtype)
    return pack(ordered_N.astype(_packed_dtype(dtype), copy=False))


def decode_anchor(stream: bytes, num_elements: int, dtype: str) -> BitsArray:
    """Inverts `encode_anchor`. Memory is bounded by `num_elements`. PayloadError for a broken stream."""
    bits = bits_dtype(dtype)
    ordered_N = unpack(stream, num_elements, _packed_dtype(dtype))
    if bits.itemsize < _MIN_ITEMSIZE and num_elements and int(ordered_N.max()) >> (8 * bits.itemsize):
        raise PayloadError(f"an element does not fit {dtype}", rule="value-range")
    return from_ordered(ordered_N.astype(bits, copy=False), dtype)


def _packed_dtype(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(f"<u{max(DTYPES[dtype].itemsize, _MIN_ITEMSIZE)}")


def pack(values: npt.NDArray[Any]) -> bytes:
    """Returns the coded stream of a flat integer array; no bytes for no values."""
    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), _CONFIG))


def unpack(stream: bytes, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Returns the `count` values of a stream. Memory is bounded by `count`. PayloadError for another count."""
    values = np.zeros(count, dtype)
    if not count:
        if stream:
            raise PayloadError("a stream of no values has bytes", rule="stream-count")
        return values
    try:
        progress = standalone.simple_decompress_into(stream, values)
    except (RuntimeError, TypeError) as error:
        raise PayloadError(f"a stream does not decode: {error}", rule="stream-decode") from error
    if progress.n_processed != count or not progress.finished:
        raise PayloadError(f"a stream does not hold {count} values", rule="stream-count")
    return values
