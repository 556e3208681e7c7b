"""Tiles and magnitude classes. Segments are cut into tiles, so that all steps after capture work on bounded memory.

The class of an element is its exponent in the base, which determines the distance between the representable values
around it. An optimizer moves all weights of a tensor by similar amounts, and a weight changes when the move crosses a
rounding boundary: twice as often for every exponent further down. A receiver has the base, and so the class of every
element.

Legend: N elements, K changed elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.types import BitsArray, Changes, Segment

#: Elements of a tile. Part of the format: segments are cut at multiples of it, counted from the segment's start.
TILE = 1 << 22

#: A magnitude class is stored as uint8.
NUM_CLASSES = 256

#: dtype -> (shift, mask): class = bits >> shift & mask. The exponent field, or its upper eight bits. Others: one class.
_EXPONENTS: dict[str, tuple[int, int]] = {
    "F8_E4M3": (3, 0x0F), "F8_E5M2": (2, 0x1F),
    "F16": (10, 0x1F), "BF16": (7, 0xFF),
    "F32": (23, 0xFF), "F64": (55, 0xFF),
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RankedChanges(Changes):
    """Changes that `gap-by-magnitude` can encode without the base.

    ranks_K: number of elements of the same class, in the base, before the changed one in its tile.
    """

    ranks_K: npt.NDArray[np.uint32]


def num_tiles(segment: Segment) -> int:
    """Returns the number of a segment's tiles; 0 when it is empty."""
    return -(-segment.length // TILE)


def tiles_of(segment: Segment) -> Iterator[Segment]:
    """Yields the tiles of a segment, in order."""
    for at in range(segment.start, segment.stop, TILE):
        yield Segment(segment.tensor, at, min(TILE, segment.stop - at))


def cut(changes: Changes) -> Iterator[Changes]:
    """Yields the changes of every tile of their segment, in order. Bits are views, not copies."""
    if changes.segment.length <= TILE:
        if changes.segment.length:
            yield changes
        return
    starts = np.arange(num_tiles(changes.segment), dtype=np.int64) * TILE
    bounds = np.append(np.searchsorted(changes.positions_K, starts), changes.num_changed)
    for number, tile in enumerate(tiles_of(changes.segment)):
        part = slice(bounds[number], bounds[number + 1])
        positions_K = changes.positions_K[part] - starts[number]
        old_K, new_K = changes.old_K[part], changes.new_K[part]
        if isinstance(changes, RankedChanges):
            yield RankedChanges(tile, positions_K, old_K, new_K, changes.ranks_K[part])
        else:
            yield Changes(tile, positions_K, old_K, new_K)


def class_field(dtype: str) -> tuple[int, int]:
    """Returns (shift, mask) of the class in an element's bits. A mask of 0 puts all elements into class 0."""
    return _EXPONENTS.get(dtype, (0, 0))


def classes_of(bits_N: BitsArray, dtype: str) -> npt.NDArray[np.uint8]:
    """Returns the class of every element."""
    shift, mask = class_field(dtype)
    classes: npt.NDArray[Any] = (bits_N >> bits_N.dtype.type(shift)) & bits_N.dtype.type(mask)
    return classes.astype(np.uint8)
