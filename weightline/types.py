"""The nouns that every room shares: dtypes, tensors, segments, changes, digests.

Legend: N elements of a segment, K changed elements. Arrays of bits are unsigned integers as wide as the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BitsArray = npt.NDArray[np.unsignedinteger[Any]]
PositionArray = npt.NDArray[np.int64]

#: Width in bytes of one element, by safetensors dtype code.
DTYPE_ITEMSIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip

#: Dtypes whose top bit is a sign with a magnitude below it (IEEE-like floats).
FLOAT_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
#: Dtypes in two's complement.

#: What a tensor may have at most: more is a broken or hostile claim.
MAX_NDIM = 32
MAX_ELEMENTS = 1 << 56

_BITS_BY_ITEMSIZE: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger[Any]]:
    """The unsigned integer dtype that holds one element's bits. Little-endian on every host."""
    return np.dtype(_BITS_BY_ITEMSIZE[DTYPE_ITEMSIZE[dtype]]).newbyteorder("<")


@dataclass(frozen=True, slots=True, order=True)
class TensorSpec:
    """What a tensor is: its name in the checkpoint, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPE_ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.itemsize


@dataclass(frozen=True, slots=True)
class Segment:
    """The half-open range [start, start + length) of a tensor flattened row-major: what one rank holds of it."""

    tensor: TensorSpec
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The elements of one segment whose bits differ between two states.

    positions_K: strictly increasing, counted from the start of the *segment*.
    old_K, new_K: the bits before and after; never equal to each other at the same place.
    """

    segment: Segment
    positions_K: PositionArray
    old_K: BitsArray
    new_K: BitsArray

    @property
    def num_changed(self) -> int:
        return int(self.positions_K.size)
