"""Compiled loops over scattered elements in host memory.

torch's own run in OpenMP regions, one for each tensor, and on a busy host each waits for its slowest thread: for small
changes of many tensors that wait is most of the time. Importing this module imports numba.

Legend: N elements of memory, K scattered ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]


@jit
def write_elements(flat_N: Array, at_K: Array, bits_K: Array) -> None:
    """flat_N[at_K] = bits_K. Nothing is checked: the caller knows that all of `at_K` lies within."""
    for k in range(at_K.size):
        flat_N[at_K[k]] = bits_K[k]


@jit
def count_differing(flat_N: Array, at_K: Array, bits_K: Array) -> np.int64:
    """How many of flat_N[at_K] differ from bits_K."""
    num_differing = np.int64(0)
    for k in range(at_K.size):
        num_differing += flat_N[at_K[k]] != bits_K[k]
    return num_differing
