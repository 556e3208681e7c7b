"""The changes of a chunk in the order that they are coded in: class after class, in each by position.

Legend: K changed elements of the chunk, P pieces, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightline.codec.classes import NUM_CLASSES
from weightline.codec.geometric import Counts, Numbers
from weightline.codec.pieces import RankedChanges
from weightline.types import DTYPE_ITEMSIZE, FLOAT_DTYPES


@dataclass(frozen=True, slots=True)
class GroupedChanges:
    """What the streams of a chunk are made of.

    counts_PC: changed elements of each class in each piece. gaps_K: unchanged elements of the class before each changed
    one. A step s is kept as sizes_K = |s| - 1 and whether it is negative.
    """

    counts_PC: Counts
    gaps_K: Numbers
    sizes_K: Numbers
    negative_K: npt.NDArray[np.bool_]


def group_changes(pieces: Sequence[RankedChanges], field: tuple[int, int], *, joined: bool) -> GroupedChanges:
    """Group adjacent pieces of one dtype by the class field (shift, mask) that they are ranked by. Pure.

    `joined`: gaps are counted on from piece to piece (there must be one class then); else each piece starts afresh.
    """
    from weightline.codec.kernels import grouping

    dtype = pieces[0].segment.tensor.dtype
    shift, mask = (np.uint64(number) for number in field)
    width = 8 * DTYPE_ITEMSIZE[dtype]
    sign = np.uint64(1 << (width - 1) if dtype in FLOAT_DTYPES else 0)
    counts_PC = np.zeros((len(pieces), NUM_CLASSES), np.int64)
    for piece, counts_C in zip(pieces, counts_PC, strict=True):
        grouping.count_classes(piece.old_K, shift, mask, counts_C)
    totals_C = counts_PC.sum(axis=0)
    num_changed = int(totals_C.sum())
    gaps_K, negative_K = np.empty(num_changed, np.uint32), np.empty(num_changed, np.bool_)
    sizes_K: Numbers = np.empty(num_changed, np.uint64 if width == 64 else np.uint32)
    next_C, after_C = (np.cumsum(totals_C) - totals_C).astype(np.uint64), np.zeros(NUM_CLASSES, np.uint64)
    before = 0
    for piece in pieces:
        grouping.group(
            piece.old_K, piece.new_K, piece.ranks_K, shift, mask, sign, np.uint64(width),
            np.uint64(before), next_C, after_C, gaps_K, sizes_K, negative_K,
        )  # fmt: skip
        if joined:
            before += piece.segment.length
        else:
            after_C[:] = 0
    return GroupedChanges(counts_PC, gaps_K, sizes_K, negative_K)
