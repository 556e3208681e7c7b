"""Steps: differences of bit patterns read as ordered integers. Lossless for any bit pattern.

Reading a float's bits as sign and magnitude and laying them out in the order of their values makes neighbours differ by
one: nearly every change of a trained bf16 weight is then +1 or -1. Arithmetic wraps modulo 2**width, so NaN payloads,
infinities and -0.0 need no case of their own. Steps over the same elements add (compaction) and negate (going back).

Legend: N elements, K changed elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.types import DTYPE_ITEMSIZE, FLOAT_DTYPES, BitsArray, bits_dtype

StepArray = npt.NDArray[np.signedinteger[Any]]


def steps_dtype(dtype: str) -> np.dtype[np.signedinteger[Any]]:
    """The signed integer dtype, as wide as one element of `dtype`, that holds its steps."""
    return np.dtype(f"<i{DTYPE_ITEMSIZE[dtype]}")


def to_ordered(bits_N: BitsArray, dtype: str) -> BitsArray:
    """Unsigned integers in the order of the values that the bits stand for (for integer dtypes: the bits themselves).

    -NaN < -inf < ... < -0.0 < +0.0 < ... < +inf < +NaN; -0.0 and +0.0 are one apart. Signed integers need no map:
    differences of two's complement are differences of values already.
    """
    if dtype not in FLOAT_DTYPES:
        return bits_N
    sign = bits_dtype(dtype).type(1 << (8 * DTYPE_ITEMSIZE[dtype] - 1))
    return np.where(bits_N & sign, ~bits_N, bits_N | sign)


def from_ordered(ordered_N: BitsArray, dtype: str) -> BitsArray:
    """Inverse of `to_ordered`."""
    if dtype not in FLOAT_DTYPES:
        return ordered_N
    sign = bits_dtype(dtype).type(1 << (8 * DTYPE_ITEMSIZE[dtype] - 1))
    return np.where(ordered_N & sign, ordered_N ^ sign, ~ordered_N)


def steps(old_K: BitsArray, new_K: BitsArray, dtype: str) -> StepArray:
    """Signed steps that lead from `old_K` to `new_K`, modulo 2**width."""
    return (to_ordered(new_K, dtype) - to_ordered(old_K, dtype)).view(steps_dtype(dtype))


def apply_steps(old_K: BitsArray, steps_K: StepArray, dtype: str) -> BitsArray:
    """The bits that `steps_K` lead to from `old_K`. Inverse of `steps`; negated steps lead back."""
    ordered_K = to_ordered(old_K, dtype) + steps_K.astype(steps_dtype(dtype), copy=False).view(bits_dtype(dtype))
    return from_ordered(ordered_K, dtype)
