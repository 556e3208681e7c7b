"""The types that all subpackages share: tensors, segments and changes.

Legend: N elements of a segment, K changed elements. Arrays of bits are unsigned integers as wide as the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.dtypes import DTYPES

BitsArray = npt.NDArray[np.unsignedinteger[Any]]
PositionArray = npt.NDArray[np.int64]

#: Bounds of a tensor's shape. A file that exceeds them is broken or hostile.
MAX_NDIM = 32
MAX_ELEMENTS = 1 << 56
#: Of a tensor's name in UTF-8.
MAX_NAME_NBYTES = 1 << 16


def is_shape_in_range(shape: Sequence[int]) -> bool:
    """Returns whether a tensor may have this shape. A dimension of 0 does not excuse the others: arrays check them."""
    return len(shape) <= MAX_NDIM and math.prod(max(dim, 1) for dim in shape) <= MAX_ELEMENTS


@dataclass(frozen=True, slots=True, order=True)
class TensorSpec:
    """A tensor's name in the checkpoint, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.num_elements * self.itemsize


@dataclass(frozen=True, slots=True)
class Segment:
    """The half-open range [start, start + length) of a tensor flattened row-major, such as the part of one rank."""

    tensor: TensorSpec
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


def whole(tensor: TensorSpec) -> Segment:
    """Returns the segment that covers the tensor."""
    return Segment(tensor, 0, tensor.num_elements)


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
