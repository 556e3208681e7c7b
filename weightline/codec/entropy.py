"""Entropy coding of anchors with pcodec (https://github.com/pcodec/pcodec), bounded and deterministic.

pcodec finds bins of a stream's distribution and codes them with tANS: right for full states, of whose ordered integers
nobody can say beforehand how they are distributed. Of a delta's gaps and steps one can: see geometric.py and rice.py.
Mode and delta order are fixed so that the same numbers always give the same bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from weightline.errors import PayloadError

_CONFIG = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())


def pack(values: npt.NDArray[Any]) -> bytes:
    """The coded stream of a flat integer array. No values, no bytes."""
    if not values.size:
        return b""
    return bytes(standalone.simple_compress(np.ascontiguousarray(values), _CONFIG))


def unpack(stream: bytes, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """The `count` values of a stream; PayloadError when it holds another number. Memory is bounded by `count`."""
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
