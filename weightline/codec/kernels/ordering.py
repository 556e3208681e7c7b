"""The loops between bits and ordered integers. The map is stated in weightline/codec/steps.py.

`sign` and `flip` are the masks of `weightline.codec.steps.ordering`: both are zero for integers, whose bits stay as
they are.

Legend: N elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]


@jit
def to_ordered(bits_N: Array, sign: np.uint64, flip: np.uint64, ordered_N: Array) -> None:
    """Writes the ordered integer of every element. `ordered_N` is as wide as the elements, or wider."""
    for n in range(bits_N.size):
        bits = np.uint64(bits_N[n])
        ordered_N[n] = bits ^ (flip if bits & sign else sign)


@jit
def from_ordered(ordered_N: Array, sign: np.uint64, flip: np.uint64, bits_N: Array) -> np.uint64:
    """Inverts `to_ordered`, also in place; returns all ordered integers or-ed together, which shows one too wide."""
    seen = np.uint64(0)
    for n in range(ordered_N.size):
        ordered = np.uint64(ordered_N[n])
        seen |= ordered
        bits_N[n] = ordered ^ (sign if ordered & sign else flip)
    return seen
