"""The coding `gap-by-magnitude`: gaps counted among the elements of the same exponent class of the base.

It gives the smallest payloads. The receiver has the base. Within one class every element is about equally likely to
change, so the gaps of a class are close to geometric and cost little more than their entropy, which is lower than that
of any coding independent of the base. The steps go in the same order, class after class, since their sizes depend on
the exponent as well.

    positions stream = head, then one geometric stream; its runs: for each class that has changes, the deviations of
                       its counts in the pieces; then for each such class its gaps, piece after piece
    head             = for each piece its changed elements; when there are any: first class, number of classes, for
                       each class its changed elements and, where not zero, the level that its gaps start from

The head lets a reader that wants only some pieces decode them without the base of the others. With two or more pieces
that have changes (the rows), the geometric stream begins with a run for each class that has changes: for each row the
deviation d = count - row total * class total // chunk total, as 2d or -2d - 1. It starts from the level of the mean
isqrt(class total // rows).

Legend: K changed elements of the chunk, P pieces, C classes, R runs, Q rows, S classes that have changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.chunknumbers import group_changes
from weightline.codec.coding import ChunkBase, Streams
from weightline.codec.geometric import Counts, Numbers, decode_runs, encode_runs, level_of, start_levels
from weightline.codec.pieces import NUM_CLASSES, RankedChanges, class_field
from weightline.codec.steps import StepArray, decode_steps, encode_steps, ordering
from weightline.codec.varint import NumberReader, put_numbers
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
        counts, gaps_K = unpack_class_counts(streams[0], num_changed, [piece.length for piece in pieces])
        steps_K = decode_steps(streams[1], num_changed, pieces[0].tensor.dtype)
        for number, piece in enumerate(pieces):
            if base.wanted[number]:
                yield _locate(piece, base.bits(number), counts, number, gaps_K, steps_K)


def _require_ranks(piece: Changes) -> RankedChanges:
    if not isinstance(piece, RankedChanges):
        name = piece.segment.tensor.name
        raise InputError(f"changes of {name!r} have no ranks: capture them with ranked=True", tensor=name)
    return piece


def _locate(
    piece: Segment, base_N: BitsArray, counts: ClassCounts, number: int, gaps_K: Counts, steps_K: StepArray
) -> Changes:
    """Returns the changes of a piece, which is the chunk's piece `number`. PayloadError when they lie beyond it."""
    from weightline.codec.kernels import locate as kernel

    dtype = piece.tensor.dtype
    counts_C = counts.counts_PC[number]
    next_C, has_changes = counts.starts_PC[number].astype(np.uint64), counts_C > 0
    ranks_C: npt.NDArray[Any] = np.full(counts_C.size, _NEVER, np.uint64)
    ranks_C[has_changes] = gaps_K[next_C[has_changes]]
    num_changed = int(counts_C.sum())
    positions_K = np.empty(num_changed, np.int64)
    old_K, new_K = np.empty(num_changed, base_N.dtype), np.empty(num_changed, base_N.dtype)
    shift, mask = (np.uint64(one) for one in class_field(dtype))
    found = kernel.locate(
        base_N, shift, mask, gaps_K.view(np.uint64), ranks_C, next_C, next_C + counts_C.view(np.uint64),
        steps_K, *ordering(dtype), positions_K, old_K, new_K,
    )  # fmt: skip
    if int(found) != num_changed:
        missing = num_changed - int(found)
        raise PayloadError(
            f"{missing} changes lie beyond their piece: the payload may belong to another base", rule="position-range"
        )
    return Changes(piece, positions_K, old_K, new_K)


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """The numbers of changed elements by piece and class.

    counts_PC: changed elements of each class in each piece; starts_PC: index of their first in the order by class.
    """

    counts_PC: Counts
    starts_PC: Counts


def pack_class_counts(counts_PC: Counts, gaps_K: Numbers) -> bytes:
    """Returns the positions stream of a chunk. `gaps_K` is ordered by class, then by piece."""
    head = bytearray()
    put_numbers(head, *counts_PC.sum(axis=1).tolist())
    totals_C = counts_PC.sum(axis=0)
    present_S = np.flatnonzero(totals_C)
    if not present_S.size:
        return bytes(head)
    levels_S = start_levels(gaps_K, totals_C[present_S])
    levels = dict(zip(present_S.tolist(), levels_S.tolist(), strict=True))
    first, last = int(present_S[0]), int(present_S[-1])
    put_numbers(head, first, last - first + 1)
    for kind in range(first, last + 1):
        put_numbers(head, int(totals_C[kind]), *([levels[kind]] if kind in levels else []))
    rows_Q = np.flatnonzero(counts_PC.sum(axis=1))
    counts_QS = counts_PC[np.ix_(rows_Q, present_S)]
    deviations = counts_QS - _expected(counts_QS.sum(axis=1), counts_QS.sum(axis=0))
    zigzag = np.where(deviations < 0, -2 * deviations - 1, 2 * deviations)
    counts_R, levels_R = _runs(rows_Q.size, totals_C[present_S], levels_S)
    values = gaps_K if rows_Q.size < 2 else np.concatenate([zigzag.T.ravel().astype(gaps_K.dtype), gaps_K])
    return encode_runs(values, counts_R, levels_R, head)


def unpack_class_counts(stream: bytes, num_changed: int, lengths_P: Sequence[int]) -> tuple[ClassCounts, Counts]:
    """Returns (counts, gaps) of a chunk whose pieces have these lengths. PayloadError for a broken stream."""
    reader = NumberReader(stream, "class-head")
    rows_P = np.array([reader.number() for _ in lengths_P], np.int64)
    if (rows_P > np.array(lengths_P)).any() or int(rows_P.sum()) != num_changed:
        raise PayloadError(f"the pieces' counts do not add up to {num_changed}", rule="piece-count")
    counts_PC = np.zeros((len(lengths_P), NUM_CLASSES), np.int64)
    if not num_changed:
        if reader.rest():
            raise PayloadError("bytes after the counts of a chunk without changes", rule="stream-length")
        return ClassCounts(counts_PC, counts_PC), np.zeros(0, np.int64)
    present_S, totals_S, levels_S = _read_classes(reader, num_changed)
    rows_Q = np.flatnonzero(rows_P)
    counts_R, levels_R = _runs(rows_Q.size, totals_S, levels_S)
    values = decode_runs(reader.rest(), counts_R, levels_R).view(np.int64)
    num_deviations = values.size - num_changed
    gaps_K = values[num_deviations:]
    if int(gaps_K.max()) >= max(lengths_P):
        raise PayloadError("a gap reaches beyond its piece", rule="position-range")
    counts_PC[np.ix_(rows_Q, present_S)] = _counts(values[:num_deviations], rows_P[rows_Q], totals_S)
    flat = np.cumsum(counts_PC.T.ravel()) - counts_PC.T.ravel()
    return ClassCounts(counts_PC, np.ascontiguousarray(flat.reshape(NUM_CLASSES, -1).T)), gaps_K


def _read_classes(reader: NumberReader, num_changed: int) -> tuple[Counts, Counts, Counts]:
    """Returns (classes that have changes, their numbers of changes, the levels of their gaps)."""
    first, count = reader.number(), reader.number()
    if first + count > NUM_CLASSES:
        raise PayloadError(f"classes {first} to {first + count}", rule="class-head")
    found = []
    for kind in range(first, first + count):
        total = reader.number()
        if total:
            found.append((kind, total, reader.number()))
    if sum(total for _, total, _ in found) != num_changed:
        raise PayloadError(f"the classes' counts do not add up to {num_changed}", rule="class-count")
    present_S, totals_S, levels_S = np.array(found, np.int64).T
    return present_S, totals_S, levels_S


def _runs(num_rows: int, totals_S: Counts, levels_S: Counts) -> tuple[Counts, Counts]:
    """Returns (lengths, start levels) of the runs of the geometric stream."""
    if num_rows < 2:
        return totals_S, levels_S
    first_levels = [level_of(math.isqrt(total // num_rows)) for total in totals_S.tolist()]
    return np.concatenate([np.full(totals_S.size, num_rows), totals_S]), np.concatenate([first_levels, levels_S])


def _expected(rows_Q: Counts, totals_S: Counts) -> Counts:
    """Returns the count of each class in each row if classes were spread evenly over rows.

    A chunk's counts are too small to overflow.
    """
    expected: Counts = rows_Q[:, None] * totals_S[None, :] // totals_S.sum()
    return expected


def _counts(zigzag: Counts, rows_Q: Counts, totals_S: Counts) -> Counts:
    """Returns row x class counts from their deviations. PayloadError when they are impossible."""
    if rows_Q.size < 2:
        return totals_S[None, :]
    half = zigzag.reshape(totals_S.size, rows_Q.size).T
    counts_QS = _expected(rows_Q, totals_S) + np.where(half & 1, -(half >> 1) - 1, half >> 1)
    if int(counts_QS.min()) < 0 or int(counts_QS.max()) > int(totals_S.sum()):
        raise PayloadError("a class has an impossible count in a piece", rule="class-count")
    if (counts_QS.sum(axis=1) != rows_Q).any() or (counts_QS.sum(axis=0) != totals_S).any():
        raise PayloadError("the counts of classes in pieces do not add up", rule="class-count")
    return counts_QS
