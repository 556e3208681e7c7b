from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.codec import reference
from weightline.codec.rice import NUM_PARAMETERS, bounds, decode_rice, encode_rice, mean_of_parameter, parameter_of
from weightline.errors import PayloadError

VALUES = st.one_of(st.integers(0, 20), st.integers(0, 70_000), st.integers(0, 2**32 - 1))
PARAMETERS = st.integers(0, NUM_PARAMETERS - 1)


@given(st.lists(VALUES, max_size=200), PARAMETERS)
def test_coder_is_the_reference_and_comes_back(values: list[int], parameter: int) -> None:
    stream = encode_rice(np.array(values, np.uint32), parameter)
    assert stream == reference.encode_rice(values, parameter)
    assert decode_rice(stream, len(values), parameter).tolist() == values


@pytest.mark.parametrize("mean", [0.2, 1.0, 2.0, 4.1, 8.3, 33.0, 266.0, 532.0, 5000.0])
def test_coder_is_the_reference_where_parameters_change(mean: float) -> None:
    """Means beside the bounds of parameters, with an outlier now and then."""
    rng = np.random.default_rng(3)
    values_K = rng.geometric(1 / (1 + mean), 3001).astype(np.uint32) - np.uint32(1)
    values_K[::97] *= 40
    for parameter in (parameter_of(mean), 8, 9, NUM_PARAMETERS - 1):
        stream = encode_rice(values_K, parameter)
        assert stream == reference.encode_rice(values_K.tolist(), parameter)
        assert np.array_equal(decode_rice(stream, values_K.size, parameter), values_K)


@pytest.mark.parametrize("quotient", [22, 23, 24, 25])
@pytest.mark.parametrize("parameter", [0, 5, 31])
def test_values_around_the_escape(quotient: int, parameter: int) -> None:
    values = [min(quotient << parameter, 2**32 - 1)] * 3
    stream = encode_rice(np.array(values, np.uint32), parameter)
    assert stream == reference.encode_rice(values, parameter)
    assert decode_rice(stream, 3, parameter).tolist() == values


@pytest.mark.parametrize("num_values", [*range(18), 64, 65])
@pytest.mark.parametrize("large", [0, 130, 383, 384, 1100, 2**31, 2**32 - 1])
def test_values_one_by_one_among_those_coded_at_once(num_values: int, large: int) -> None:
    """One value that is clipped, makes its word too long, or is escaped, at each place of a group, and in the rest."""
    for place in range(num_values):
        values = [12] * num_values
        values[place] = large
        stream = encode_rice(np.array(values, np.uint32), 4)
        assert stream == reference.encode_rice(values, 4)


@pytest.mark.parametrize("parameter", [0, 6, 7, 8, 20, 21, 22, 25, 31])
def test_means_that_rise_and_fall_through_all_parameters(parameter: int) -> None:
    rng = np.random.default_rng(5)
    rising = rng.integers(0, 2 ** np.linspace(1, 32, 1501), dtype=np.uint64).astype(np.uint32)
    values_K = np.concatenate([rising, rising[::-1], np.zeros(700, np.uint32), rising[:700]])
    stream = encode_rice(values_K, parameter)
    assert stream == reference.encode_rice(values_K.tolist(), parameter)


@pytest.mark.parametrize("mean", [8.0, 23.0, 100.0, 1e4, 1e7])
def test_geometric_numbers_cost_little_more_than_their_entropy(mean: float) -> None:
    rng = np.random.default_rng(7)
    values_K = (rng.geometric(1 / (1 + mean), 50_000) - 1).astype(np.uint32)
    p = 1 / (1 + mean)
    entropy_bits = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p
    assert 8 * len(encode_rice(values_K, parameter_of(mean))) / values_K.size < 1.03 * entropy_bits


def test_values_need_not_lie_in_one_piece() -> None:
    values_K = np.arange(100, dtype=np.uint64)
    assert encode_rice(values_K[::2], 4) == reference.encode_rice(values_K[::2].tolist(), 4)


def test_a_parameter_serves_the_mean_that_it_starts_at() -> None:
    for parameter in range(NUM_PARAMETERS):
        assert parameter_of(mean_of_parameter(parameter) / 65536) == parameter
    assert bounds() == sorted(bounds())


def encoded() -> bytes:
    return encode_rice(np.random.default_rng(9).integers(0, 300, 500).astype(np.uint32), 6)


@pytest.mark.parametrize("cut", [1, 8, 80])
def test_a_stream_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(PayloadError):
        decode_rice(encoded()[:-cut], 500, 6)


def test_a_stream_with_more_than_its_values_is_refused() -> None:
    for stream, count in ((encoded() + bytes(8), 500), (encoded(), 450)):
        with pytest.raises(PayloadError) as caught:
            decode_rice(stream, count, 6)
        assert caught.value.facts["rule"] == "stream-length"


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(PayloadError) as caught:
        decode_rice(encoded(), 500, NUM_PARAMETERS)
    assert caught.value.facts["rule"] == "stream-level"


@given(st.binary(max_size=200).map(lambda raw: raw[: len(raw) // 8 * 8]), st.integers(0, 400), PARAMETERS)
def test_any_words_decode_or_are_refused(stream: bytes, count: int, parameter: int) -> None:
    try:
        values_K = decode_rice(stream, count, parameter)
    except PayloadError:
        return
    assert values_K.size == count
