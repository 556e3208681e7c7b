"""Converts the changes of a chunk to the numbers that are coded: gaps, and steps as |step| - 1 with a sign.

Legend: K changed elements of the chunk, P pieces, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weightline.codec.geometric import Counts, Numbers
from weightline.codec.pieces import NUM_CLASSES, RankedChanges
from weightline.dtypes import DTYPES
from weightline.types import Changes


@dataclass(frozen=True, slots=True)
class CodedNumbers:
    """The numbers from which the streams of a chunk are coded.

    gaps_K: unchanged elements before each changed one. A step s is stored as sizes_K = |s| - 1 and negative_K.
    """

    gaps_K: Numbers
    sizes_K: Numbers
    negative_K: npt.NDArray[np.bool_]


def flatten_changes(pieces: Sequence[Changes]) -> CodedNumbers:
    """Returns gaps and steps, by position, of adjacent pieces of one dtype laid end to end. Pure."""
    from weightline.codec.kernels import grouping

    dtype = pieces[0].segment.tensor.dtype
    numbers = _allocate(sum(piece.num_changed for piece in pieces), dtype)
    flatten = grouping.flatten_16 if DTYPES[dtype].itemsize == 2 else grouping.flatten
    sign, unused = _ordering(dtype)
    first, last = 0, -1
    for piece in pieces:
        if piece.num_changed:
            old_K, new_K = np.ascontiguousarray(piece.old_K), np.ascontiguousarray(piece.new_K)
            last = flatten(
                piece.positions_K, old_K, new_K, first, last, sign, unused,
                numbers.gaps_K, numbers.sizes_K, numbers.negative_K,
            )  # fmt: skip
            first += piece.num_changed
        last -= piece.segment.length
    return numbers


def group_changes(pieces: Sequence[RankedChanges], field: tuple[int, int]) -> tuple[Counts, CodedNumbers]:
    """Returns (counts_PC, numbers) of pieces of one dtype, ordered by class, then piece, then position. Pure.

    counts_PC: changed elements of each class in each piece, by the class field (shift, mask) that they are ranked by.
    Gaps are counted among the elements of a class, from the start of each piece.
    """
    from weightline.codec.kernels import grouping

    dtype = pieces[0].segment.tensor.dtype
    shift, mask = (np.uint64(number) for number in field)
    counts_PC = np.zeros((len(pieces), NUM_CLASSES), np.int64)
    for piece, counts_C in zip(pieces, counts_PC, strict=True):
        if piece.num_changed:
            grouping.count_classes(piece.old_K, shift, mask, counts_C)
    totals_C = counts_PC.sum(axis=0)
    numbers = _allocate(int(totals_C.sum()), dtype)
    next_C = (np.cumsum(totals_C) - totals_C).astype(np.uint64)
    is_16_bit = DTYPES[dtype].itemsize == 2
    packed_K = np.empty(numbers.gaps_K.size if is_16_bit else 0, np.uint64)
    group = grouping.group_16 if is_16_bit else grouping.group
    columns = (packed_K,) if is_16_bit else (numbers.gaps_K, numbers.sizes_K, numbers.negative_K)
    sign, unused = _ordering(dtype)
    for piece in (piece for piece in pieces if piece.num_changed):
        after_C = np.zeros(NUM_CLASSES, np.uint64)
        group(
            piece.old_K, piece.new_K, piece.ranks_K, shift, mask, sign, unused, next_C, after_C, *columns
        )  # fmt: skip
    if is_16_bit:
        grouping.unpack_16(packed_K, numbers.gaps_K, numbers.sizes_K, numbers.negative_K)
    return counts_PC, numbers


def _allocate(num_changed: int, dtype: str) -> CodedNumbers:
    sizes_dtype = np.dtype(f"u{max(2, DTYPES[dtype].itemsize)}")  # no narrower: |step| - 1 of one byte needs nine bits
    return CodedNumbers(
        np.empty(num_changed, np.uint32), np.empty(num_changed, sizes_dtype), np.empty(num_changed, np.bool_)
    )


def _ordering(dtype: str) -> tuple[np.uint64, np.uint64]:
    """Returns (sign bit of a float, zero for others; 64 less the bits of an element) as the kernels take them."""
    width = 8 * DTYPES[dtype].itemsize
    return np.uint64(1 << (width - 1) if DTYPES[dtype].is_float else 0), np.uint64(64 - width)
