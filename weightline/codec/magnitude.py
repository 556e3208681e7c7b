"""The coding `gap-by-magnitude`: gaps counted among the elements of the same exponent class of the base. The small one.

The receiver knows the base. Within one class every element is about equally likely to change, so the gaps of a class
are close to geometric and cost little more than their entropy; that is below what any coding blind to the base can
reach. The steps go in the same order, class after class: their sizes, too, depend on the exponent.

    positions stream = head (see classcounts.py), then one geometric stream; its runs: for each class that has changes,
                       the deviations of its counts in the pieces; then for each such class its gaps, piece after piece

Legend: K changed elements of the chunk, P pieces, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.chunknumbers import group_changes
from weightline.codec.classcounts import ClassCounts, pack_class_counts, unpack_class_counts
from weightline.codec.classes import class_field
from weightline.codec.coding import ChunkBase, Streams
from weightline.codec.geometric import Counts
from weightline.codec.pieces import RankedChanges
from weightline.codec.steps import apply_steps
from weightline.codec.stepstream import decode_steps, encode_steps
from weightline.errors import InputError, PayloadError
from weightline.types import BitsArray, Changes, Segment

_NEVER = 1 << 62


class MagnitudeCoding:
    """Gaps within classes, and steps, in adaptive geometric coding, class after class."""

    name = "gap-by-magnitude"
    ranked = True

    def encode(self, pieces: Sequence[Changes]) -> Streams:
        field = class_field(pieces[0].segment.tensor.dtype)
        counts_PC, numbers = group_changes([_require_ranks(piece) for piece in pieces], field)
        return pack_class_counts(counts_PC, numbers.gaps_K), encode_steps(numbers.sizes_K, numbers.negative_K)

    def decode(
        self, streams: Streams, pieces: Sequence[Segment], num_changed: int, base: ChunkBase
    ) -> Iterator[Changes]:
        dtype = pieces[0].tensor.dtype
        counts, gaps_K = unpack_class_counts(streams[0], num_changed, [piece.length for piece in pieces])
        steps_K = decode_steps(streams[1], num_changed, dtype)
        for number, piece in enumerate(pieces):
            if base.wanted[number]:
                base_N = base.bits(number)
                positions_K, order_K = _locate(base_N, dtype, counts, number, gaps_K)
                old_K = base_N[positions_K]
                yield Changes(piece, positions_K, old_K, apply_steps(old_K, steps_K[order_K], dtype))


def _require_ranks(piece: Changes) -> RankedChanges:
    if not isinstance(piece, RankedChanges):
        name = piece.segment.tensor.name
        raise InputError(f"changes of {name!r} have no ranks: capture(..., ranked=True) or rank_changes()", tensor=name)
    return piece


def _locate(
    base_N: BitsArray, dtype: str, counts: ClassCounts, piece: int, gaps_K: Counts
) -> tuple[npt.NDArray[np.int64], Counts]:
    """(positions of the piece's changes, where each stands in the order of the classes)."""
    from weightline.codec.kernels import scan

    shift, mask = (np.uint64(number) for number in class_field(dtype))
    next_C, counts_C = counts.starts_PC[piece].copy(), counts.counts_PC[piece]
    has_changes = counts_C > 0
    left_C: npt.NDArray[Any] = np.full(counts_C.size, _NEVER)
    left_C[has_changes] = gaps_K[next_C[has_changes]]
    num_changed = int(counts_C.sum())
    positions_K, order_K = np.empty(num_changed, np.int64), np.empty(num_changed, np.int64)
    found = scan.locate(base_N, shift, mask, gaps_K, left_C, next_C, next_C + counts_C, positions_K, order_K)
    if int(found) != num_changed:
        missing = num_changed - int(found)
        raise PayloadError(f"{missing} changes lie beyond their piece; is it another base?", rule="position-range")
    return positions_K, order_K
