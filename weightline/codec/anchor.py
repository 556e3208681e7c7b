"""Codes anchors: full bits of a tile as ordered integers, losslessly, by pcodec (https://github.com/pcodec/pcodec).

pcodec finds bins of the distribution and codes them with tANS. That suits full states, whose distribution is unknown.
The distribution of a delta's gaps and steps is known: see geometric.py and rice.py. Mode and delta order are fixed, so
that the same numbers always give the same bytes.

Legend: N elements of the tile.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from weightline.codec.steps import ordering
from weightline.dtypes import DTYPES
from weightline.errors import PayloadError
from weightline.types import BitsArray

#: Name of the anchors' coding in payloads.
ANCHOR_CODING = "ordered-pco"

#: pcodec is faster on 32-bit numbers than on narrower ones, at no loss of compression.
_MIN_ITEMSIZE = 4

_of_thread = threading.local()

_CONFIG = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())


def encode_anchor(bits_N: BitsArray, dtype: str) -> bytes:
    """Returns the coded stream of a tile's bits. Pure, safe in threads."""
    from weightline.codec.kernels import ordering as kernel

    ordered_N = _scratch(bits_N.size, dtype)
    sign, flip, _ = ordering(dtype)
    kernel.to_ordered(np.ascontiguousarray(bits_N), sign, flip, ordered_N)
    return pack(ordered_N)


def decode_anchor(stream: bytes, dtype: str, bits_N: BitsArray) -> None:
    """Inverts `encode_anchor` into `bits_N`, the tile's contiguous elements. Safe in threads.

    Memory is bounded by the tile. PayloadError for a broken stream; then the elements may have any bits.
    """
    from weightline.codec.kernels import ordering as kernel

    ordered_N = _scratch(bits_N.size, dtype)
    unpack(stream, ordered_N)
    sign, flip, _ = ordering(dtype)
    seen = int(kernel.from_ordered(ordered_N, sign, flip, bits_N))
    if seen >> (8 * bits_N.itemsize):
        raise PayloadError(f"an element does not fit {dtype}", rule="value-range")


def _scratch(num_elements: int, dtype: str) -> npt.NDArray[Any]:
    """Returns memory of this thread for ordered integers, until the thread asks again.

    New memory for every tile would cost as much as the map: the system clears its pages.
    """
    width = np.dtype(f"<u{max(DTYPES[dtype].itemsize, _MIN_ITEMSIZE)}")
    nbytes = num_elements * width.itemsize
    held: npt.NDArray[np.uint8] | None = getattr(_of_thread, "scratch", None)
    if held is None or held.nbytes < nbytes:
        held = _of_thread.scratch = np.empty(nbytes, np.uint8)
    return held[:nbytes].view(width)


def pack(values: npt.NDArray[Any]) -> bytes:
    """Returns the coded stream of a flat integer array; no bytes for no values."""
    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), _CONFIG))


def unpack(stream: bytes, values: npt.NDArray[Any]) -> None:
    """Fills `values` with the values of a stream. PayloadError for another number of them."""
    if not values.size:
        if stream:
            raise PayloadError("a stream of no values has bytes", rule="stream-count")
        return
    try:
        progress = standalone.simple_decompress_into(stream, values)
    except (RuntimeError, TypeError) as error:
        raise PayloadError(f"a stream does not decode: {error}", rule="stream-decode") from error
    if progress.n_processed != values.size or not progress.finished:
        raise PayloadError(f"a stream does not hold {values.size} values", rule="stream-count")
