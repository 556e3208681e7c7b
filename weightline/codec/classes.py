"""Magnitude classes: the exponent of an element, which tells how far apart the values around it are.

An optimizer moves all weights of a tensor by similar amounts, and a weight changes when the move crosses a rounding
boundary: twice as often for every exponent further down. The receiver knows the base, hence the class of every element.

Legend: N elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.types import BitsArray

#: Classes are bytes.
NUM_CLASSES = 256

#: dtype -> (shift, mask): class = bits >> shift & mask. The exponent field, or its upper eight bits. Others: one class.
_EXPONENTS: dict[str, tuple[int, int]] = {
    "F8_E4M3": (3, 0x0F), "F8_E5M2": (2, 0x1F),
    "F16": (10, 0x1F), "BF16": (7, 0xFF),
    "F32": (23, 0xFF), "F64": (55, 0xFF),
}  # fmt: skip


def class_field(dtype: str) -> tuple[int, int]:
    """(shift, mask) of the class in an element's bits; a mask of 0 puts all elements into class 0."""
    return _EXPONENTS.get(dtype, (0, 0))


def classes_of(bits_N: BitsArray, dtype: str) -> npt.NDArray[np.uint8]:
    """The class of every element."""
    shift, mask = class_field(dtype)
    classes: npt.NDArray[Any] = (bits_N >> bits_N.dtype.type(shift)) & bits_N.dtype.type(mask)
    return classes.astype(np.uint8)
