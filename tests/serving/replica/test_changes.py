"""Changes of whole tensors: joined, composed, turned round."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weightline.codec.capture import capture
from weightline.codec.changes import compose, inverse, join_parts
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
