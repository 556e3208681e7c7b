"""Capture: compares the bits of two states of a segment and returns the elements that differ.

Legend: N elements of the segment, K changed elements, C magnitude classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.pieces import NUM_CLASSES, TILE, RankedChanges, class_field
from weightline.dtypes import bits_dtype
from weightline.errors import InputError
from weightline.types import BitsArray, Changes, Segment, TensorSpec, whole

Array = npt.NDArray[Any]

Kernel = Callable[..., tuple[np.uint64, np.uint64]]

#: Minimum free capacity for changed elements, with which every kernel can make at least one step.
_MIN_ROOM = 1 << 13
#: Initial capacity: one element in 2**4. Pages that are never written to take no memory.
_EXPECTED_SHIFT = 4


def capture(segment: Segment, old_N: BitsArray, new_N: BitsArray, *, ranked: bool = False) -> Changes:
    """Returns the elements of `segment` whose bits differ between `old_N` and `new_N`; RankedChanges when `ranked`.

    Bits are compared, not values: NaN equals itself, -0.0 differs from +0.0. Neither array is written to. Pure, safe to
    repeat, safe in threads. Raises InputError when an array does not have the segment's length and width.
    """
    collector = _Collector(segment, check_bits(segment, old_N), check_bits(segment, new_N), ranked)
    for start in range(0, segment.length, TILE):
        collector.scan_tile(start, min(start + TILE, segment.length))
    return collector.changes()


def capture_all(parts: Iterable[tuple[Segment, BitsArray, BitsArray]], *, ranked: bool = False) -> Iterator[Changes]:
    """Captures each (segment, old bits, new bits) and yields the changes of those segments that differ, in order."""
    for segment, old_N, new_N in parts:
        changes = capture(segment, old_N, new_N, ranked=ranked)
        if changes.num_changed:
            yield changes


def capture_tensors(
    specs: Iterable[TensorSpec], old: Mapping[str, BitsArray], new: Mapping[str, BitsArray], *, ranked: bool = False
) -> Iterator[Changes]:
    """Captures whole tensors between two states that hold their bits by name. Yields those that differ, in order."""
    return capture_all(((whole(spec), old[spec.name], new[spec.name]) for spec in specs), ranked=ranked)


def check_bits(segment: Segment, bits_N: BitsArray) -> BitsArray:
    """Returns `bits_N`. InputError unless it is flat and has the segment's length and width."""
    expected = bits_dtype(segment.tensor.dtype)
    if bits_N.ndim != 1 or bits_N.size != segment.length or bits_N.dtype != expected:
        raise InputError(
            f"segment of {segment.tensor.name!r} needs a flat {expected} array of {segment.length} elements, "
            f"not {bits_N.dtype} of shape {bits_N.shape}",
            tensor=segment.tensor.name,
        )
    return bits_N


class _Collector:
    """Runs the kernels over tiles. They write directly into the result, which grows as needed."""

    def __init__(self, segment: Segment, old_N: BitsArray, new_N: BitsArray, ranked: bool) -> None:
        self._segment = segment
        self._states = np.ascontiguousarray(old_N), np.ascontiguousarray(new_N)
        self._ranked = ranked
        self._found = 0
        capacity = max(_MIN_ROOM, segment.length >> _EXPECTED_SHIFT)
        dtypes = (np.dtype(np.int64), old_N.dtype, old_N.dtype, np.dtype(np.uint32))
        self._columns: list[Array] = [np.empty(capacity, dtype) for dtype in dtypes[: 4 if ranked else 3]]

    def scan_tile(self, start: int, stop: int) -> None:
        """Collects the differing elements of [start, stop). `start` is a multiple of TILE."""
        from weightline.codec.kernels import scan

        shift, mask = class_field(self._segment.tensor.dtype)
        if self._ranked and mask:
            counts_C = np.zeros(NUM_CLASSES, np.uint32)
            self._run(scan.collect_ranked, start, stop, counts_C, np.uint64(shift), np.uint64(mask))
        else:
            before = self._found
            self._run(scan.collect, start, stop)
            self._rank_single_class(before, start)

    def _rank_single_class(self, before: int, start: int) -> None:
        """Sets the ranks of a tile whose elements are of one class: an element's rank is its position in the tile."""
        if self._ranked:
            self._columns[3][before : self._found] = self._columns[0][before : self._found] - start

    def _run(self, kernel: Kernel, at: int, stop: int, *ranking: Array | np.uint64) -> None:
        columns = slice(4 if ranking else 3)
        while at < stop:
            room = [column[self._found :] for column in self._columns[columns]]
            found, reached = kernel(*self._states, np.uint64(at), np.uint64(stop), *room, *ranking)
            self._found, at = self._found + int(found), int(reached)
            if at < stop:
                capacity = 2 * self._columns[0].size + _MIN_ROOM
                self._columns = [_grown(column, self._found, capacity) for column in self._columns]

    def changes(self) -> Changes:
        """Returns all changes found so far."""
        columns = [column[: self._found] for column in self._columns]
        if not self._ranked:
            return Changes(self._segment, columns[0], columns[1], columns[2])
        return RankedChanges(self._segment, columns[0], columns[1], columns[2], columns[3])


def _grown(column: Array, used: int, capacity: int) -> Array:
    grown = np.empty(capacity, column.dtype)
    grown[:used] = column[:used]
    return grown
