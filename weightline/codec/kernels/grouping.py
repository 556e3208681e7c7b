"""Turn the changes of a chunk into gaps and steps: by position, or by class in one counting sort.

Legend: K changed elements, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit
from weightline.codec.kernels.lanes import GROUP, above_zero, count_ones, lowest_one, put_steps_16

Array = npt.NDArray[Any]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_FULL = np.uint64((1 << 64) - 1)
_GAP_AT = np.uint64(32)
_BLOCK = np.uint64(512)


@jit
def count_classes(old_K: Array, shift: np.uint64, mask: np.uint64, counts_C: Array) -> None:
    """Add the number of changed elements of each class."""
    for k in range(np.uint64(old_K.size)):
        counts_C[(np.uint64(old_K[k]) >> shift) & mask] += 1


@jit
def _ordered(bits: np.uint64, sign: np.uint64) -> np.uint64:
    """The ordered integer of an element; `sign` is its sign bit, zero for integer dtypes."""
    return bits ^ (_FULL if bits & sign else sign)


@jit
def _step(old: np.uint64, new: np.uint64, sign: np.uint64, unused: np.uint64) -> Any:
    """The signed step; `unused` is how many bits of 64 an element does not have."""
    return np.int64((_ordered(new, sign) - _ordered(old, sign)) << unused) >> np.int64(unused)


@inlined
def _gaps(positions_K: Array, gaps_K: Array, last: int) -> None:
    """Unchanged elements before each change of one piece; `last`: the change before, counted from the piece's start."""
    gaps_K[0] = np.uint32(positions_K[0] - last - 1)
    for k in range(_ONE, np.uint64(positions_K.size)):
        gaps_K[k] = np.uint32(positions_K[k] - positions_K[k - _ONE] - 1)


@jit
def flatten(
    positions_K: Array, old_K: Array, new_K: Array, first: int, last: int, sign: np.uint64, unused: np.uint64,
    gaps_K: Array, sizes_K: Array, negative_K: Array,
) -> int:  # fmt: skip
    """Gaps and steps of one piece by position, written from `first` on; return the last position.

    The piece has changes. A step s is kept as its size |s| - 1 and whether it is negative.
    """
    gaps_K, sizes_K, negative_K = gaps_K[first:], sizes_K[first:], negative_K[first:]
    _gaps(positions_K, gaps_K, last)
    for k in range(np.uint64(old_K.size)):
        step = _step(np.uint64(old_K[k]), np.uint64(new_K[k]), sign, unused)
        negative_K[k] = step < 0
        sizes_K[k] = ~step if step < 0 else step - 1
    return int(positions_K[-1])


@inlined
def _step_16(old: Any, new: Any, float_mask: Any) -> Any:
    """The step of a 16-bit element in 32-bit arithmetic, which compiles to vectors; `float_mask` is -1 for floats."""
    old, new = np.int32(np.int16(old)), np.int32(np.int16(new))
    old ^= np.int32((old >> 31) & float_mask & 0x7FFF)
    new ^= np.int32((new >> 31) & float_mask & 0x7FFF)
    return np.int32(np.int16(np.int32(new - old)))


@jit
def flatten_16(
    positions_K: Array, old_K: Array, new_K: Array, first: int, last: int, sign: np.uint64, unused: np.uint64,
    gaps_K: Array, sizes_K: Array, negative_K: Array,
) -> int:  # fmt: skip
    """`flatten` of 16-bit elements."""
    gaps_K, sizes_K, negative_K = gaps_K[first:], sizes_K[first:], negative_K[first:]
    _gaps(positions_K, gaps_K, last)
    float_mask, size = np.int32(-1 if sign else 0), np.uint64(old_K.size)
    whole = size & ~np.uint64(GROUP - 1)
    for at in range(_ZERO, whole, np.uint64(GROUP)):
        put_steps_16(old_K, new_K, at, sign - _ONE if sign else _ZERO, sizes_K, negative_K)
    for k in range(whole, size):
        step = _step_16(old_K[k], new_K[k], float_mask)
        negative_K[k] = step < 0
        sizes_K[k] = np.uint16((step ^ (step >> 31)) - np.int32(step >= 0))
    return int(positions_K[-1])


@jit
def large_steps(sizes_K: Array, values: Array) -> int:
    """Of the steps larger than one: the unit steps before each, then their sizes |s| - 2; return how many there are."""
    found, size = _ZERO, np.uint64(sizes_K.size)
    whole = size & ~np.uint64(GROUP - 1)
    for base in range(_ZERO, whole, np.uint64(GROUP)):
        large = above_zero(sizes_K, base)
        for _ in range(count_ones(large)):
            values[found] = base + lowest_one(large)
            large &= large - _ONE
            found += _ONE
    for k in range(whole, size):
        values[found] = k
        found += np.uint64(sizes_K[k] > 0)
    after = _ZERO
    for j in range(found):
        place = np.uint64(values[j])
        values[j], values[found + j] = place - after, np.uint64(sizes_K[place]) - _ONE
        after = place + _ONE
    return int(found)


@jit
def group(
    old_K: Array, new_K: Array, ranks_K: Array, shift: np.uint64, mask: np.uint64, sign: np.uint64, unused: np.uint64,
    next_C: Array, after_C: Array, gaps_K: Array, sizes_K: Array, negative_K: Array,
) -> None:  # fmt: skip
    """Scatter one piece by class.

    next_C: where the class's next change goes; it moves on. after_C: the rank after the class's last change; zeros at
    the start of a piece.
    """
    for k in range(np.uint64(old_K.size)):
        old = np.uint64(old_K[k])
        kind = (old >> shift) & mask
        here = next_C[kind]
        next_C[kind] = here + _ONE
        rank = np.uint64(ranks_K[k])
        gaps_K[here] = np.uint32(rank - after_C[kind])
        after_C[kind] = rank + _ONE
        step = _step(old, np.uint64(new_K[k]), sign, unused)
        negative_K[here] = step < 0
        sizes_K[here] = ~step if step < 0 else step - 1


@jit
def group_16(
    old_K: Array, new_K: Array, ranks_K: Array, shift: np.uint64, mask: np.uint64, sign: np.uint64, unused: np.uint64,
    next_C: Array, after_C: Array, packed_K: Array,
) -> None:  # fmt: skip
    """`group` of 16-bit elements, whose numbers are scattered as one: gap << 32 | size << 1 | negative."""
    float_mask, steps_B = np.int32(-1 if sign else 0), np.empty(_BLOCK, np.uint32)
    for block in range(_ZERO, np.uint64(old_K.size), _BLOCK):
        length = min(_BLOCK, np.uint64(old_K.size) - block)
        for n in range(length):
            step = _step_16(old_K[block + n], new_K[block + n], float_mask)
            steps_B[n] = ((step ^ (step >> 31)) - np.int32(step >= 0)) << 1 | np.int32(step < 0)
        for n in range(length):
            kind = (np.uint64(old_K[block + n]) >> shift) & mask
            here, rank = next_C[kind], np.uint64(ranks_K[block + n])
            packed_K[here] = (rank - after_C[kind]) << _GAP_AT | np.uint64(steps_B[n])
            next_C[kind], after_C[kind] = here + _ONE, rank + _ONE


@jit
def unpack_16(packed_K: Array, gaps_K: Array, sizes_K: Array, negative_K: Array) -> None:
    """The numbers that `group_16` packed."""
    for k in range(np.uint64(packed_K.size)):
        packed = packed_K[k]
        gaps_K[k], sizes_K[k] = np.uint32(packed >> _GAP_AT), np.uint16(packed >> _ONE)
        negative_K[k] = (packed & _ONE) != _ZERO
