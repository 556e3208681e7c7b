"""Pieces: segments cut into tiles, so that everything after capture works on bounded memory.

Legend: K changed elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightline.types import Changes, Segment

#: Elements of a tile. Part of the format: segments are cut at multiples of it, counted from the segment's start.
TILE = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class RankedChanges(Changes):
    """Changes that `gap-by-magnitude` can encode when the base is gone.

    ranks_K: how many elements of the same class, in the base, lie before the changed one in its tile.
    """

    ranks_K: npt.NDArray[np.uint32]


def num_tiles(segment: Segment) -> int:
    """How many tiles a segment has; none when it is empty."""
    return -(-segment.length // TILE)


def tiles_of(segment: Segment) -> Iterator[Segment]:
    """The tiles of a segment, in order."""
    for at in range(segment.start, segment.stop, TILE):
        yield Segment(segment.tensor, at, min(TILE, segment.stop - at))


def cut(changes: Changes) -> Iterator[Changes]:
    """The changes of every tile of their segment, in order; views, no copies of bits."""
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
