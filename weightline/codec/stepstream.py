"""The steps stream of a chunk, the same for every coding: a sign each, and the few that are larger than one.

    stream = sign bits (one a step, lowest bit first, set for negative; padded to a byte)
             number of large steps, and when there are any: two levels, then one geometric stream of two runs:
             the unit steps before each large one, and the sizes |s| - 2 of the large ones

Legend: K changed elements of the chunk, J large steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.geometric import Numbers, decode_runs, encode_runs, start_levels
from weightline.codec.steps import StepArray, steps_dtype
from weightline.codec.varint import NumberReader, put_numbers
from weightline.errors import PayloadError


def encode_steps(sizes_K: Numbers, negative_K: npt.NDArray[np.bool_]) -> bytes:
    """The stream of steps given as |s| - 1 and whether they are negative. No steps, no bytes."""
    from weightline.codec.kernels import grouping

    if not sizes_K.size:
        return b""
    head = bytearray(np.packbits(negative_K, bitorder="little").tobytes())
    values: Numbers = np.empty(2 * sizes_K.size + 1, np.uint64 if sizes_K.itemsize == 8 else np.uint32)
    num_large = int(grouping.large_steps(sizes_K, values))
    put_numbers(head, num_large)
    if not num_large:
        return bytes(head)
    values = values[: 2 * num_large]
    counts_R = np.array([num_large, num_large], np.int64)
    levels_R = start_levels(values, counts_R)
    put_numbers(head, *levels_R.tolist())
    return encode_runs(values, counts_R, levels_R, head)


def decode_steps(stream: bytes, num_changed: int, dtype: str) -> StepArray:
    """The steps of a stream. Memory is bounded by `num_changed`. Raises PayloadError."""
    width = steps_dtype(dtype)
    if not num_changed:
        if stream:
            raise PayloadError("a stream of no steps has bytes", rule="stream-length")
        return np.zeros(0, width)
    reader = NumberReader(stream, "step-head")
    signs = np.frombuffer(reader.take(-(-num_changed // 8)), np.uint8)
    negative_K = np.unpackbits(signs, count=num_changed, bitorder="little").view(np.bool_)
    sizes_K = np.zeros(num_changed, np.int64)
    num_large = reader.number()
    if num_large > num_changed:
        raise PayloadError(f"{num_large} large steps among {num_changed}", rule="step-count")
    if num_large:
        large_J, size_J = _decode_large(reader, num_large, num_changed)
        sizes_K[large_J] = size_J
    elif reader.rest():
        raise PayloadError("bytes after the last step", rule="stream-length")
    limit = (1 << (8 * width.itemsize - 1)) - 1
    if int(sizes_K.min()) < 0 or int((sizes_K - negative_K).max()) >= limit:
        raise PayloadError(f"a step does not fit {dtype}", rule="step-range")
    return np.where(negative_K, ~sizes_K, sizes_K + 1).astype(width)


def _decode_large(reader: NumberReader, num_large: int, num_changed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(places among the steps, |s| - 1) of the large steps."""
    levels_R = np.array([reader.number(), reader.number()], np.int64)
    values = decode_runs(reader.rest(), np.array([num_large, num_large], np.int64), levels_R)
    runs_J = values[:num_large]
    if int(runs_J.max()) >= num_changed or int(runs_J.sum()) + num_large > num_changed:
        raise PayloadError("a large step lies beyond the last", rule="step-count")
    return np.cumsum(runs_J.astype(np.int64) + 1) - 1, values[num_large:].view(np.int64) + 1
