"""The loops of the state digest. The formula is stated in weightline/codec/digest.py and SPEC.md.

Legend: N elements, K changed elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]
Lanes = tuple[np.uint64, np.uint64]

_INDEX_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_LOW_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_HIGH_FACTOR = np.uint64(0x94D049BB133111EB)
_SHIFT_29 = np.uint64(29)
_SHIFT_32 = np.uint64(32)


@jit
def _mix(x: np.uint64, seed_1: np.uint64) -> Lanes:
    y = (x ^ (x >> _SHIFT_32)) * _LOW_FACTOR
    y ^= y >> _SHIFT_29
    z = (y ^ seed_1) * _HIGH_FACTOR
    return y, z ^ (z >> _SHIFT_32)


@jit
def mix_range(bits_N: Array, start: np.uint64, seed_0: np.uint64, seed_1: np.uint64) -> Lanes:
    """Sums over elements that lie next to each other, the first at tensor index `start`."""
    low = high = np.uint64(0)
    place = seed_0 + start * _INDEX_FACTOR
    for n in range(bits_N.size):
        y, z = _mix(place + np.uint64(bits_N[n]), seed_1)
        low += y
        high += z
        place += _INDEX_FACTOR
    return low, high


@jit
def mix_change(
    positions_K: Array, old_K: Array, new_K: Array, start: np.uint64, seed_0: np.uint64, seed_1: np.uint64
) -> Lanes:
    """Sums over the new elements minus sums over the old; positions count from tensor index `start`."""
    low = high = np.uint64(0)
    for k in range(positions_K.size):
        place = seed_0 + (start + np.uint64(positions_K[k])) * _INDEX_FACTOR
        old_y, old_z = _mix(place + np.uint64(old_K[k]), seed_1)
        new_y, new_z = _mix(place + np.uint64(new_K[k]), seed_1)
        low += new_y - old_y
        high += new_z - old_z
    return low, high
