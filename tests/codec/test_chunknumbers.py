from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.states import DTYPES, Pair, changed, random_bits, whole
from weightline.codec.capture import capture
from weightline.codec.chunknumbers import CodedNumbers, flatten_changes, group_changes
from weightline.codec.kernels import grouping
from weightline.codec.pieces import RankedChanges, class_field, classes_of
from weightline.codec.steps import steps
from weightline.types import Changes


def ranked(pair: Pair) -> RankedChanges:
    changes = capture(*pair, ranked=True)
    assert isinstance(changes, RankedChanges)
    return changes


@st.composite
def chunks(draw: st.DrawFn) -> list[RankedChanges]:
    """Pieces of one dtype."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))
    found = []
    for length in draw(st.lists(st.integers(1, 200), min_size=1, max_size=4)):
        old_N = random_bits(rng, dtype, length)
        found.append(ranked((whole("w", dtype, length), old_N, changed(rng, old_N, draw(st.sampled_from([0.0, 0.3]))))))
    return found


def assert_steps(numbers: CodedNumbers, pieces: list[Changes] | list[RankedChanges], order_K: np.ndarray) -> None:
    dtype = pieces[0].segment.tensor.dtype
    steps_K = np.concatenate([steps(piece.old_K, piece.new_K, dtype) for piece in pieces])[order_K].astype(object)
    coded_K = numbers.sizes_K.astype(object) + 1
    coded_K[numbers.negative_K] *= -1
    assert coded_K.tolist() == steps_K.tolist()


@given(chunks())
def test_flattened_changes_are_distances_and_steps_by_position(pieces: list[RankedChanges]) -> None:
    numbers = flatten_changes(pieces)
    starts = np.cumsum([0] + [piece.segment.length for piece in pieces])
    at_K = np.concatenate([piece.positions_K + start for piece, start in zip(pieces, starts, strict=False)])
    assert np.array_equal(numbers.gaps_K, np.diff(at_K, prepend=-1) - 1)
    assert_steps(numbers, pieces, np.arange(at_K.size))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "I16", "U16"])
def test_steps_between_any_two_patterns_of_16_bits(dtype: str) -> None:
    """Pieces of less than a group, of whole groups and of some more, from and to the ends of the range."""
    edges = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF, 0x3F80, 0xBF80], np.uint16)
    old_N, new_N = (pattern.ravel() for pattern in np.meshgrid(edges, edges))
    pieces = [ranked((whole("w", dtype, n), old_N[:n], new_N[:n])) for n in (1, 69, 70, 71, old_N.size)]
    numbers = flatten_changes(pieces)
    assert {63, 64, 65} & {piece.num_changed for piece in pieces}
    assert_steps(numbers, pieces, np.arange(numbers.sizes_K.size))


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_columns_need_not_lie_in_one_piece(dtype: str) -> None:
    rng = np.random.default_rng(0)
    old_N = random_bits(rng, dtype, 1000)
    changes = ranked((whole("w", dtype, 1000), old_N, changed(rng, old_N, 0.5)))
    apart = [np.repeat(column, 2)[::2] for column in (changes.positions_K, changes.old_K, changes.new_K)]
    numbers, expected = flatten_changes([Changes(changes.segment, *apart)]), flatten_changes([changes])
    assert np.array_equal(numbers.gaps_K, expected.gaps_K)
    assert np.array_equal(numbers.sizes_K, expected.sizes_K)
    assert np.array_equal(numbers.negative_K, expected.negative_K)


@given(chunks())
def test_grouped_changes_are_sorted_by_class_piece_and_position(pieces: list[RankedChanges]) -> None:
    dtype = pieces[0].segment.tensor.dtype
    counts_PC, numbers = group_changes(pieces, class_field(dtype))
    class_K = np.concatenate([classes_of(piece.old_K, dtype) for piece in pieces])
    piece_K = np.repeat(np.arange(len(pieces)), [piece.num_changed for piece in pieces])
    order_K = np.lexsort((np.arange(class_K.size), piece_K, class_K))
    ranks_K = np.concatenate([piece.ranks_K for piece in pieces])[order_K].astype(np.int64)
    group_K = class_K[order_K].astype(np.int64) * len(pieces) + piece_K[order_K]
    is_first_K = np.diff(group_K, prepend=-1) != 0
    expected_K = np.where(is_first_K, ranks_K, np.diff(ranks_K, prepend=0) - 1)
    assert np.array_equal(numbers.gaps_K, expected_K)
    assert counts_PC.T.ravel().tolist() == np.bincount(group_K, minlength=counts_PC.size).tolist()
    assert_steps(numbers, pieces, order_K)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("num_steps", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_large_steps_are_listed_with_the_unit_steps_before_them(dtype: type, num_steps: int, share: float) -> None:
    rng = np.random.default_rng(num_steps)
    sizes_K = np.where(rng.random(num_steps) < share, rng.integers(1, 2**15, num_steps), 0).astype(dtype)
    values = np.empty(2 * num_steps + 1, np.uint64)
    num_large = grouping.large_steps(sizes_K, values)
    large_J = np.flatnonzero(sizes_K)
    assert num_large == large_J.size
    assert np.array_equal(values[:num_large], np.diff(large_J, prepend=-1) - 1)
    assert np.array_equal(values[num_large : 2 * num_large], sizes_K[large_J] - dtype(1))
