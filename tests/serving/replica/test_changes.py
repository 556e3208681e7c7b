"""Changes of whole tensors: joined, composed, turned round."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightline.codec.capture import capture
from weightline.codec.changes import add_moves, compose, inverse, join_parts, join_tiles, negate_moves
from weightline.codec.pieces import RankedChanges
from weightline.codec.steps import apply_steps, steps
from weightline.types import BitsArray, Changes, Segment, TensorSpec, whole

TENSOR = TensorSpec("w", "BF16", (17,))
#: Few bit patterns, so that elements often come back to where they were.
states = hnp.arrays(np.dtype("<u2"), 17, elements=st.integers(0, 3))


def applied(state: BitsArray, changes: Changes) -> BitsArray:
    np.testing.assert_array_equal(state[changes.positions_K], changes.old_K)
    moved = state.copy()
    moved[changes.positions_K] = changes.new_K
    return moved


def assert_same(actual: Changes, expected: Changes) -> None:
    assert actual.segment == expected.segment
    np.testing.assert_array_equal(actual.positions_K, expected.positions_K, strict=True)
    np.testing.assert_array_equal(actual.old_K, expected.old_K, strict=True)
    np.testing.assert_array_equal(actual.new_K, expected.new_K, strict=True)


@given(states, states, states)
def test_composing_two_moves_is_the_move_from_first_to_last(a: BitsArray, b: BitsArray, c: BitsArray) -> None:
    segment = whole(TENSOR)
    assert_same(compose(capture(segment, a, b), capture(segment, b, c)), capture(segment, a, c))


@given(states, states)
def test_the_inverse_leads_back(a: BitsArray, b: BitsArray) -> None:
    there = capture(whole(TENSOR), a, b)
    np.testing.assert_array_equal(applied(applied(a, there), inverse(there)), a)


@given(states, states, st.lists(st.integers(0, 17), max_size=4), st.randoms())
def test_parts_of_any_partition_join_in_any_order(a: BitsArray, b: BitsArray, cuts: list[int], order: object) -> None:
    bounds = sorted({0, 17, *cuts})
    parts = [
        capture(Segment(TENSOR, start, stop - start), a[start:stop], b[start:stop])
        for start, stop in itertools.pairwise(bounds)
    ]
    order.shuffle(parts)  # type: ignore[attr-defined]
    assert_same(join_parts(parts), capture(whole(TENSOR), a, b))


@given(states, states, states)
def test_moves_add_up_and_undo(a: BitsArray, b: BitsArray, c: BitsArray) -> None:
    """Steps decoded against zeros: only the way from zero to the new bits says something."""
    segment, zeros = whole(TENSOR), np.zeros(17, np.uint16)

    def moves(old: BitsArray, new: BitsArray) -> Changes:
        return capture(segment, zeros, apply_steps(zeros, steps(old, new, "BF16"), "BF16"))

    assert_same(add_moves(moves(a, b), moves(b, c)), moves(a, c))
    assert_same(negate_moves(moves(a, b)), moves(b, a))


@given(states, states, st.lists(st.integers(0, 17), max_size=4), st.booleans())
def test_tiles_join_with_their_ranks(a: BitsArray, b: BitsArray, cuts: list[int], is_ranked: bool) -> None:
    bounds = sorted({0, 17, *cuts})
    tiles = [
        capture(Segment(TENSOR, start, stop - start), a[start:stop], b[start:stop], ranked=is_ranked)
        for start, stop in itertools.pairwise(bounds)
    ]
    joined = join_tiles(whole(TENSOR), tiles)
    assert_same(joined, capture(whole(TENSOR), a, b))
    if is_ranked:
        assert isinstance(joined, RankedChanges)
        assert joined.ranks_K.tolist() == [
            rank for tile in tiles if isinstance(tile, RankedChanges) for rank in tile.ranks_K.tolist()
        ]
