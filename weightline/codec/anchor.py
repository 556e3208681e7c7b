"""Anchors: full bits of a tile as ordered integers, coded losslessly by pcodec.

Legend: N elements of the tile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from weightline.codec.entropy import pack, unpack
from weightline.codec.steps import from_ordered, to_ordered
from weightline.errors import PayloadError
from weightline.types import DTYPE_ITEMSIZE, BitsArray, bits_dtype

#: Name of the anchors' coding in payloads.
ANCHOR_CODING = "ordered-pco"
#: pcodec is faster, and no worse, on 32-bit numbers than on narrower ones.
_MIN_ITEMSIZE = 4


def encode_anchor(bits_N: BitsArray, dtype: str) -> bytes:
    """The coded stream of a tile's bits. Pure."""
    ordered_N = to_ordered(bits_N, dtype)
    return pack(ordered_N.astype(_packed_dtype(dtype), copy=False))


def decode_anchor(stream: bytes, num_elements: int, dtype: str) -> BitsArray:
    """Inverse of `encode_anchor`; memory is bounded by `num_elements`. Raises PayloadError."""
    bits = bits_dtype(dtype)
    ordered_N = unpack(stream, num_elements, _packed_dtype(dtype))
    if bits.itemsize < _MIN_ITEMSIZE and num_elements and int(ordered_N.max()) >> (8 * bits.itemsize):
        raise PayloadError(f"an element does not fit {dtype}", rule="value-range")
    return from_ordered(ordered_N.astype(bits, copy=False), dtype)


def _packed_dtype(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    return np.dtype(f"<u{max(DTYPE_ITEMSIZE[dtype], _MIN_ITEMSIZE)}")
