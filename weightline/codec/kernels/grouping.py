"""Bring the changes of a chunk into the order of their classes: one counting sort for gaps and steps.

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
def group(
    old_K: Array, new_K: Array, ranks_K: Array, shift: np.uint64, mask: np.uint64, sign: np.uint64, width: np.uint64,
    before: np.uint64, next_C: Array, after_C: Array, gaps_K: Array, sizes_K: Array, negative_K: Array,
) -> None:  # fmt: skip
    """Scatter one piece. A step s is kept as its size |s| - 1 and whether it is negative.

    before: what to add to the piece's ranks; next_C: where the class's next change goes; after_C: the rank after the
    class's last change. The last two move on.
    """
    unused = np.uint64(64) - width
    for k in range(np.uint64(old_K.size)):
        old, new = np.uint64(old_K[k]), np.uint64(new_K[k])
        kind = (old >> shift) & mask
        here = next_C[kind]
        next_C[kind] = here + _ONE
        rank = before + np.uint64(ranks_K[k])
        gaps_K[here] = np.uint32(rank - after_C[kind])
        after_C[kind] = rank + _ONE
        step = np.int64((_ordered(new, sign) - _ordered(old, sign)) << unused) >> np.int64(unused)
        negative_K[here] = step < 0
        sizes_K[here] = ~step if step < 0 else step - 1
