from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from tests.codec.states import DTYPES, Pair, pairs, random_bits
from weightline.codec.steps import apply_steps, from_ordered, steps, to_ordered
from weightline.dtypes import bits_dtype, signed_dtype


@given(pairs())
def test_steps_lead_from_old_to_new_and_back(pair: Pair) -> None:
    segment, old_N, new_N = pair
    dtype = segment.tensor.dtype
    steps_N = steps(old_N, new_N, dtype)
    assert steps_N.dtype == signed_dtype(dtype)
    assert np.array_equal(apply_steps(old_N, steps_N, dtype), new_N)
    assert np.array_equal(apply_steps(new_N, -steps_N, dtype), old_N)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_two_deltas_add_up_to_those_of_one(dtype: str) -> None:
    rng = np.random.default_rng(3)
    a_N, b_N, c_N = (random_bits(rng, dtype, 2000) for _ in range(3))
    assert np.array_equal(steps(a_N, b_N, dtype) + steps(b_N, c_N, dtype), steps(a_N, c_N, dtype))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F16", "BF16", "U8", "I16"])
def test_every_bit_pattern_survives_the_ordered_map(dtype: str) -> None:
    bits_N = np.arange(1 << (8 * bits_dtype(dtype).itemsize)).astype(bits_dtype(dtype))
    assert np.array_equal(from_ordered(to_ordered(bits_N, dtype), dtype), bits_N)


@pytest.mark.parametrize(("dtype", "float_dtype"), [("F16", np.float16), ("F32", np.float32), ("F64", np.float64)])
def test_ordered_integers_are_in_the_order_of_the_values(dtype: str, float_dtype: type) -> None:
    values_N = random_bits(np.random.default_rng(5), dtype, 4000).view(float_dtype)
    values_N = np.sort(values_N[np.isfinite(values_N)])
    ordered_N = to_ordered(values_N.view(bits_dtype(dtype)), dtype)
    assert (np.diff(ordered_N.astype(np.float64)) >= 0).all()


def test_neighbours_are_one_step_apart() -> None:
    minus_zero, plus_zero, tiny, one, above_one = 0x8000, 0x0000, 0x0001, 0x3F80, 0x3F81
    old_N = np.array([minus_zero, plus_zero, one, above_one, 0x8001], np.uint16)
    new_N = np.array([plus_zero, tiny, above_one, one, minus_zero], np.uint16)
    assert steps(old_N, new_N, "BF16").tolist() == [1, 1, 1, -1, 1]


def test_steps_wrap_around() -> None:
    lowest, highest = np.array([0xFFFF], np.uint16), np.array([0x7FFF], np.uint16)
    assert steps(lowest, highest, "BF16").tolist() == [-1]
    assert apply_steps(lowest, np.array([-1], np.int16), "BF16").tolist() == [0x7FFF]
