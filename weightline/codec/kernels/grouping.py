"""Turn the changes of a chunk into gaps and steps: by position, or by class in one counting sort.

Legend: K changed elements, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_FULL = np.uint64((1 << 64) - 1)


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


@jit
def gaps(positions_K: Array, gaps_K: Array, last: int) -> None:
    """Unchanged elements before each change of one piece; `last`: the change before, counted from the piece's start."""
    if positions_K.size:
        gaps_K[0] = np.uint32(positions_K[0] - last - 1)
    for k in range(1, positions_K.size):
        gaps_K[k] = np.uint32(positions_K[k] - positions_K[k - 1] - 1)


@jit
def steps(old_K: Array, new_K: Array, sign: np.uint64, unused: np.uint64, sizes_K: Array, negative_K: Array) -> None:
    """Steps by position. A step s is kept as its size |s| - 1 and whether it is negative."""
    for k in range(old_K.size):
        step = _step(np.uint64(old_K[k]), np.uint64(new_K[k]), sign, unused)
        negative_K[k] = step < 0
        sizes_K[k] = ~step if step < 0 else step - 1


@jit
def steps_16(old_K: Array, new_K: Array, sign: np.uint32, sizes_K: Array, negative_K: Array) -> None:
    """`steps` of 16-bit elements, in 32-bit arithmetic, which compiles to vectors."""
    float_mask = np.int32(-1 if sign else 0)
    for k in range(old_K.size):
        old, new = np.int32(np.int16(old_K[k])), np.int32(np.int16(new_K[k]))
        old ^= np.int32((old >> 31) & float_mask & 0x7FFF)
        new ^= np.int32((new >> 31) & float_mask & 0x7FFF)
        step = np.int32(np.int16(np.int32(new - old)))
        negative_K[k] = step < 0
        sizes_K[k] = np.uint16((step ^ (step >> 31)) - np.int32(step >= 0))


@jit
def large_steps(sizes_K: Array, values: Array) -> int:
    """Of the steps larger than one: the unit steps before each, and their sizes |s| - 2, one column each; how many."""
    found = _ZERO
    for k in range(np.uint64(sizes_K.size)):
        values[0, found] = k
        found += np.uint64(sizes_K[k] > 0)
    after = _ZERO
    for j in range(found):
        place = np.uint64(values[0, j])
        values[0, j], values[1, j] = place - after, np.uint64(sizes_K[place]) - _ONE
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
