"""Turn the changes of a chunk into gaps and steps: by position, or by class in one counting sort.

Legend: K changed elements, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]

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
def flatten(
    positions_K: Array, old_K: Array, new_K: Array, sign: np.uint64, unused: np.uint64,
    gaps_K: Array, sizes_K: Array, negative_K: Array, last: int,
) -> int:  # fmt: skip
    """Gaps and steps of one piece, by position; `last` is the last change before, counted from the piece's start.

    A step s is kept as its size |s| - 1 and whether it is negative. Returns the piece's last change, or `last`.
    """
    for k in range(np.uint64(positions_K.size)):
        gaps_K[k] = np.uint32(positions_K[k] - last - 1)
        last = positions_K[k]
        step = _step(np.uint64(old_K[k]), np.uint64(new_K[k]), sign, unused)
        negative_K[k] = step < 0
        sizes_K[k] = ~step if step < 0 else step - 1
    return last


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
