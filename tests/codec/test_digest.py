from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.codec.states import DTYPES, Pair, pairs, random_bits, whole
from weightline.codec import reference
from weightline.codec.capture import capture
from weightline.codec.changes import inverse
from weightline.codec.digest import (
    add_digests,
    digest_change,
    digest_to_limbs,
    format_digest,
    limbs_to_digest,
    limbs_to_lanes,
    parse_digest,
    tensor_digest,
)
from weightline.errors import InputError
from weightline.types import BitsArray, Segment, TensorSpec

DIGESTS = st.integers(0, 2**128 - 1)


def sum_of_parts(tensor: TensorSpec, bits_N: BitsArray, num_parts: int) -> int:
    bounds = np.linspace(0, bits_N.size, num_parts + 1).astype(int)
    total = 0
    for start, stop in pairwise(bounds):
        part = Segment(tensor, int(start), int(stop - start))
        total = add_digests(total, tensor_digest(part, bits_N[start:stop]))
    return total


@given(pairs())
def test_digest_is_the_reference(pair: Pair) -> None:
    segment, old_N, _ = pair
    assert tensor_digest(segment, old_N) == reference.mix_sum(segment, np.arange(old_N.size), old_N)


@given(pairs())
def test_a_change_moves_the_digest_from_old_to_new(pair: Pair) -> None:
    segment, old_N, new_N = pair
    moved = add_digests(tensor_digest(segment, old_N), digest_change(capture(segment, old_N, new_N)))
    assert moved == tensor_digest(segment, new_N)
    back = add_digests(moved, digest_change(inverse(capture(segment, old_N, new_N))))
    assert back == tensor_digest(segment, old_N)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digest_does_not_depend_on_the_partition(dtype: str, num_parts: int) -> None:
    segment = whole("w", dtype, 1000)
    bits_N = random_bits(np.random.default_rng(1), dtype, 1000)
    assert sum_of_parts(segment.tensor, bits_N, num_parts) == tensor_digest(segment, bits_N)


@pytest.mark.parametrize("dtype", ["U8", "BF16", "F32", "I64"])
def test_every_flipped_bit_changes_the_digest(dtype: str) -> None:
    segment = whole("w", dtype, 64)
    bits_N = random_bits(np.random.default_rng(2), dtype, 64)
    seen = {tensor_digest(segment, bits_N)}
    for element in range(64):
        for bit in range(8 * bits_N.itemsize):
            flipped_N = bits_N.copy()
            flipped_N[element] ^= bits_N.dtype.type(1 << bit)
            seen.add(tensor_digest(segment, flipped_N))
    assert len(seen) == 1 + 64 * 8 * bits_N.itemsize


def test_every_swap_of_different_elements_changes_the_digest() -> None:
    segment = whole("w", "BF16", 80)
    bits_N = np.arange(80, dtype=np.uint16) + np.uint16(0x3F80)
    seen = {tensor_digest(segment, bits_N)}
    for a in range(80):
        for b in range(a):
            swapped_N = bits_N.copy()
            swapped_N[[a, b]] = swapped_N[[b, a]]
            seen.add(tensor_digest(segment, swapped_N))
    assert len(seen) == 1 + 80 * 79 // 2


def test_opposite_steps_of_two_elements_do_not_cancel() -> None:
    segment = whole("w", "BF16", 4000)
    bits_N = np.full(4000, 0x3F80, np.uint16)
    seen = set()
    for element in range(0, 4000, 2):
        moved_N = bits_N.copy()
        moved_N[element] += 1
        moved_N[element + 1] -= 1
        seen.add(tensor_digest(segment, moved_N))
    assert len(seen | {tensor_digest(segment, bits_N)}) == 2001


def test_name_dtype_and_shape_are_part_of_the_digest() -> None:
    bits_N = np.arange(12, dtype=np.uint16)
    tensors = [
        TensorSpec("a", "BF16", (12,)), TensorSpec("b", "BF16", (12,)), TensorSpec("a", "F16", (12,)),
        TensorSpec("a", "BF16", (3, 4)), TensorSpec("a", "BF16", (4, 3)), TensorSpec("a", "BF16", (13,)),
    ]  # fmt: skip
    assert len({tensor_digest(Segment(tensor, 0, 12), bits_N) for tensor in tensors}) == len(tensors)


def test_positions_beyond_two_to_the_32_count() -> None:
    tensor = TensorSpec("w", "BF16", (1 << 40,))
    bits_N = np.arange(5, dtype=np.uint16)
    starts = [0, 1 << 31, 1 << 32, (1 << 40) - 5]
    assert len({tensor_digest(Segment(tensor, start, 5), bits_N) for start in starts}) == len(starts)


def test_digest_of_nothing_is_zero() -> None:
    assert tensor_digest(whole("w", "BF16", 0), np.zeros(0, np.uint16)) == 0


@given(st.lists(DIGESTS, max_size=9))
def test_limbs_of_many_ranks_add_up(digests: list[int]) -> None:
    limbs = np.array([digest_to_limbs(digest) for digest in digests], np.int64).reshape(-1, 4).sum(axis=0)
    total = 0
    for digest in digests:
        total = add_digests(total, digest)
    assert limbs_to_digest(limbs.tolist()) == total


@given(DIGESTS)
def test_text_form(digest: int) -> None:
    text = format_digest(digest)
    assert len(text) == 32
    assert parse_digest(text) == digest


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "G" * 32, "A" * 32, " " + "0" * 31, "0x" + "0" * 30])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="32 lower-case hex digits"):
        parse_digest(text)


def test_a_frozen_digest() -> None:
    bits_N = np.array([0x3F80, 0x8000, 0x7FC1, 0x0001], np.uint16)
    segment = Segment(TensorSpec("model.norm.weight", "BF16", (4,)), 0, 4)
    assert format_digest(tensor_digest(segment, bits_N)) == "b70c99d08fac87a93101655f48e1faca"


@given(st.lists(st.lists(st.integers(0, (1 << 128) - 1), min_size=1, max_size=4), min_size=1, max_size=5))
def test_limbs_of_many_tensors_become_lanes_at_once(ranks_of_tensors: list[list[int]]) -> None:
    summed = [np.array([digest_to_limbs(one) for one in ranks], np.int64).sum(axis=0) for ranks in ranks_of_tensors]
    lanes_T = limbs_to_lanes(np.array(summed))
    expected = [limbs_to_digest([int(limb) for limb in limbs]) for limbs in summed]
    assert [int(high) << 64 | int(low) for high, low in lanes_T] == expected
