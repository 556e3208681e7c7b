"""Compiled loops over scattered elements in host memory: write them, or compare them.

torch's own run in OpenMP regions, one a tensor, and on a busy host each waits for its slowest thread: for small changes
of many tensors that wait is most of the time.

Indices are unsigned: numba then leaves out the check for negative ones, which takes a fifth of the time.

Legend: N elements of memory, K scattered ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]

#: Elements of a block that is written and read back: as many 64-byte lines fit the smallest second-level cache in use.
_BLOCK = np.uint64(2048)
_ZERO = np.uint64(0)


@jit
def write_and_count_differing(flat_N: Array, at_K: Array, bits_K: Array) -> np.int64:
    """flat_N[at_K] = bits_K, block by block; returns how many of a block differ when all of it is read again.

    Nothing is checked: all of `at_K` lies within. Cache misses are what this costs, so each block is read back while
    its lines are still in the core's cache.
    """
    num_differing, size = np.int64(0), np.uint64(at_K.size)
    for start in range(_ZERO, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        for k in range(start, stop):
            flat_N[np.uint64(at_K[k])] = bits_K[k]
        for k in range(start, stop):
            num_differing += flat_N[np.uint64(at_K[k])] != bits_K[k]
    return num_differing


@jit
def count_differing(flat_N: Array, at_K: Array, bits_K: Array) -> np.int64:
    """Returns how many of flat_N[at_K] differ from bits_K."""
    num_differing = np.int64(0)
    for k in range(np.uint64(at_K.size)):
        num_differing += flat_N[np.uint64(at_K[k])] != bits_K[k]
    return num_differing
