"""Steps: differences of bit patterns read as ordered integers, and the stream that holds those of a chunk. Lossless.

A float's bits are read as sign and magnitude and mapped to integers in the order of their values, so that neighbors
differ by one: nearly every change of a trained bf16 weight is then +1 or -1. Arithmetic wraps modulo 2**width, so NaN
payloads, infinities and -0.0 need no special case. Steps over the same elements can be added (compaction) and negated
(backward application).

    stream = sign bits (one a step, lowest bit first, set for negative; padded to a byte)
             number of large steps, and when there are any: two levels, then one geometric stream of two runs:
             the unit steps before each large one, and the sizes |s| - 2 of the large ones

Legend: N elements, K changed elements of the chunk, J large steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.geometric import Numbers, decode_runs, encode_runs, start_levels
from weightline.codec.varint import NumberReader, put_numbers
from weightline.dtypes import DTYPES, bits_dtype, signed_dtype
from weightline.errors import PayloadError
from weightline.types import BitsArray

StepArray = npt.NDArray[np.signedinteger[Any]]


def to_ordered(bits_N: BitsArray, dtype: str) -> BitsArray:
    """Returns unsigned integers in the order of the elements' values. For integer dtypes these are the bits themselves.

    -NaN < -inf < ... < -0.0 < +0.0 < ... < +inf < +NaN; -0.0 and +0.0 are one apart. Signed integers need no map:
    differences of two's complement are differences of values already.
    """
    if not DTYPES[dtype].is_float:
        return bits_N
    sign = bits_dtype(dtype).type(1 << (8 * DTYPES[dtype].itemsize - 1))
    return np.where(bits_N & sign, ~bits_N, bits_N | sign)


def from_ordered(ordered_N: BitsArray, dtype: str) -> BitsArray:
    """Inverts `to_ordered`."""
    if not DTYPES[dtype].is_float:
        return ordered_N
    sign = bits_dtype(dtype).type(1 << (8 * DTYPES[dtype].itemsize - 1))
    return np.where(ordered_N & sign, ordered_N ^ sign, ~ordered_N)


def ordering(dtype: str) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Returns the masks (sign, flip, full) by which kernels map bits to ordered integers and back.

    full: all of the dtype's bits; sign, flip: the sign and all bits of a float, zero for an integer.
    """
    width = 8 * DTYPES[dtype].itemsize
    full = (1 << width) - 1
    sign, flip = (1 << width - 1, full) if DTYPES[dtype].is_float else (0, 0)
    return np.uint64(sign), np.uint64(flip), np.uint64(full)


def steps(old_K: BitsArray, new_K: BitsArray, dtype: str) -> StepArray:
    """Returns the signed steps from `old_K` to `new_K`, modulo 2**width."""
    return (to_ordered(new_K, dtype) - to_ordered(old_K, dtype)).view(signed_dtype(dtype))


def apply_steps(old_K: BitsArray, steps_K: StepArray, dtype: str) -> BitsArray:
    """Returns the bits after adding `steps_K` to `old_K`. Inverts `steps`; negated steps undo the addition."""
    ordered_K = to_ordered(old_K, dtype) + steps_K.astype(signed_dtype(dtype), copy=False).view(bits_dtype(dtype))
    return from_ordered(ordered_K, dtype)


def encode_steps(sizes_K: Numbers, negative_K: npt.NDArray[np.bool_]) -> bytes:
    """Returns the stream of steps, given as |s| - 1 and a mask of negative ones; no bytes for no steps."""
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
    """Returns the steps of a stream. Memory is bounded by `num_changed`. PayloadError for a broken stream."""
    width = signed_dtype(dtype)
    if not num_changed:
        if stream:
            raise PayloadError("a stream of no steps has bytes", rule="stream-length")
        return np.zeros(0, width)
    reader = NumberReader(stream, "step-head")
    signs = np.frombuffer(reader.take(-(-num_changed // 8)), np.uint8)
    negative_K = np.unpackbits(signs, count=num_changed, bitorder="little").view(np.int8)
    steps_K: StepArray = (1 - 2 * negative_K).astype(width)
    num_large = reader.number()
    if num_large > num_changed:
        raise PayloadError(f"{num_large} large steps among {num_changed}", rule="step-count")
    if num_large:
        large_J, size_J = _decode_large(reader, num_large, num_changed)
        negative_J = negative_K[large_J].astype(np.bool_)
        limit = (1 << (8 * width.itemsize - 1)) - 1
        if int(size_J.min()) < 0 or int((size_J - negative_J).max()) >= limit:
            raise PayloadError(f"a step does not fit {dtype}", rule="step-range")
        steps_K[large_J] = np.where(negative_J, ~size_J, size_J + 1)
    elif reader.rest():
        raise PayloadError("bytes after the last step", rule="stream-length")
    return steps_K


def _decode_large(reader: NumberReader, num_large: int, num_changed: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Returns (indices among the steps, |s| - 1) of the large steps."""
    levels_R = np.array([reader.number(), reader.number()], np.int64)
    values = decode_runs(reader.rest(), np.array([num_large, num_large], np.int64), levels_R)
    runs_J = values[:num_large]
    if int(runs_J.max()) >= num_changed or int(runs_J.sum()) + num_large > num_changed:
        raise PayloadError("a large step lies beyond the last", rule="step-count")
    return np.cumsum(runs_J.astype(np.int64) + 1) - 1, values[num_large:].view(np.int64) + 1
