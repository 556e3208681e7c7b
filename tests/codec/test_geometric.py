from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.codec import reference
from weightline.codec.geometric import decode_runs, encode_runs, level_of, start_levels, tables
from weightline.errors import PayloadError

VALUES = st.one_of(st.integers(0, 20), st.integers(0, 70_000), st.integers(0, 2**63 - 1))
RUNS = st.lists(st.tuples(st.lists(VALUES, max_size=40), st.integers(0, 203)), max_size=6)


def as_arrays(runs: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = np.array([value for run, _ in runs for value in run], np.uint64)
    return values, np.array([len(run) for run, _ in runs], np.int64), np.array([level for _, level in runs], np.int64)


@given(RUNS)
def test_coder_is_the_reference_and_comes_back(runs: list[tuple[list[int], int]]) -> None:
    values_K, counts_R, levels_R = as_arrays(runs)
    stream = encode_runs(values_K, counts_R, levels_R)
    assert stream == reference.encode_runs(values_K.tolist(), counts_R.tolist(), levels_R.tolist())
    assert np.array_equal(decode_runs(stream, counts_R, levels_R), values_K)


@pytest.mark.parametrize("mean", [0.0, 0.001, 0.3, 1.0, 7.9, 8.1, 100.0, 1e4, 1e9])
def test_geometric_numbers_cost_their_entropy(mean: float) -> None:
    rng = np.random.default_rng(7)
    values_K = (rng.geometric(1 / (1 + mean), 50_000) - 1).astype(np.uint64)
    counts_R = np.array([values_K.size], np.int64)
    stream = encode_runs(values_K, counts_R, start_levels(values_K, counts_R))
    p = 1 / (1 + mean)
    entropy_bits = -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) / p if mean else 0.0
    assert 8 * len(stream) / values_K.size < 1.01 * entropy_bits + 0.01


@pytest.mark.parametrize("mean", [0.01, 0.8, 7.9, 22.0, 300.0, 1e9])
def test_coder_is_the_reference_where_levels_change(mean: float) -> None:
    rng = np.random.default_rng(6)
    values = (rng.geometric(1 / (1 + mean), 1500) - 1).tolist()
    values[::50] = [8 * value + 8 for value in values[::50]]
    values_K, counts_R = np.array(values, np.uint64), np.array([700, 800], np.int64)
    levels_R = start_levels(values_K, counts_R)
    stream = encode_runs(values_K, counts_R, levels_R)
    assert stream == reference.encode_runs(values, counts_R.tolist(), levels_R.tolist())
    assert np.array_equal(decode_runs(stream, counts_R, levels_R), values_K)


def test_the_mean_follows_the_values() -> None:
    rng = np.random.default_rng(8)
    values_K = np.concatenate([rng.geometric(p, 20_000) - 1 for p in (0.5, 0.001, 0.5)]).astype(np.uint64)
    counts_R = np.array([values_K.size], np.int64)
    stream = encode_runs(values_K, counts_R, start_levels(values_K, counts_R))
    apart = sum(
        len(encode_runs(part, np.array([20_000]), start_levels(part, np.array([20_000]))))
        for part in np.split(values_K, 3)
    )
    assert len(stream) < 1.02 * apart


def test_a_carry_runs_through_words_of_ones() -> None:
    """Values whose interval always holds one half: what is written spells 0.0111... until the last one."""
    t = tables()
    low, span, mean, half = 0, (1 << 64) - 1, int(t.bounds_L[60]), 1 << 63
    values: list[int] = []
    for left in reversed(range(200)):
        level = int(np.searchsorted(t.bounds_L, mean, side="right")) - 1
        row = t.cumulative[t.rows_L[level]].astype(object)
        part = span >> 16
        # The last token whose start lies below one half; in the end the first one that lies above.
        token = sum(low + part * start < half for start in row[:-1]) - (1 if left else 0)
        low, span = low + part * row[token], part * (row[token + 1] - row[token])
        if span < 1 << 32:
            low, span, half = low << 32, span << 32, half << 32
        values.append(int(t.starts_T[token]) << int(t.shifts_L[level]))
        mean = reference.next_mean(mean, values[-1])
    values_K, counts_R, levels_R = np.array(values, np.uint64), np.array([200]), np.array([60])
    stream = encode_runs(values_K, counts_R, levels_R)
    assert stream == reference.encode_runs(values, [200], [60])
    assert np.array_equal(decode_runs(stream, counts_R, levels_R), values_K)
    words = np.frombuffer(stream[1 : 1 + 4 * stream[0]], "<u4")
    assert words[0] == 0x80000000
    assert (words[1:9] == 0).all()


def test_tables_cover_every_level() -> None:
    t = tables()
    assert (np.diff(t.bounds_L) > 0).all()
    assert (np.diff(t.cumulative.astype(np.int64), axis=1) > 0).all()
    assert (t.cumulative[:, 0] == 0).all()
    assert (t.cumulative[:, -1] == 1 << 16).all()
    assert t.rows_L.max() + 1 == len(t.cumulative)
    assert np.array_equal(t.starts_T[1:], t.starts_T[:-1] + (np.uint64(1) << t.bits_T[:-1]))


def test_tables_are_frozen() -> None:
    """The probabilities are part of the format: another platform must come to the same ones."""
    t = tables()
    assert t.cumulative.shape == (60, 78)
    arrays = (t.bounds_L, t.shifts_L, t.rows_L, t.cumulative, t.starts_T, t.bits_T)
    digest = hashlib.sha256(b"".join(array.astype("<u8").tobytes() for array in arrays)).hexdigest()
    assert digest == "9a222b12c01d48a0986f76fb34017ee60982c5a7583a673f6ee58a2c7c2d5d55"


@pytest.mark.parametrize("mean", [0.0, 1e-9, 0.5, 3.0, 1e3, 1e12, 1e30])
def test_a_level_holds_its_mean(mean: float) -> None:
    level = level_of(mean)
    bounds_L = tables().bounds_L
    assert 0 <= level < bounds_L.size - 1
    if mean <= 2**40:
        assert bounds_L[level] <= mean * 65536 < bounds_L[level + 1]


def encoded() -> tuple[bytes, np.ndarray, np.ndarray]:
    values_K = np.random.default_rng(9).integers(0, 300, 500).astype(np.uint64)
    counts_R = np.array([200, 300], np.int64)
    return encode_runs(values_K, counts_R, np.array([50, 60])), counts_R, np.array([50, 60])


@pytest.mark.parametrize("cut", [1, 4, 100])
def test_a_stream_cut_off_is_refused(cut: int) -> None:
    stream, counts_R, levels_R = encoded()
    with pytest.raises(PayloadError):
        decode_runs(stream[:-cut], counts_R, levels_R)


def test_a_stream_with_more_than_its_values_is_refused() -> None:
    stream, counts_R, levels_R = encoded()
    with pytest.raises(PayloadError) as caught:
        decode_runs(stream + b"\0\0\0\0", counts_R, levels_R)
    assert caught.value.facts["rule"] == "stream-length"
    with pytest.raises(PayloadError):
        decode_runs(stream, counts_R - np.array([0, 30]), levels_R)


def test_an_unknown_level_is_refused() -> None:
    stream, counts_R, _ = encoded()
    with pytest.raises(PayloadError) as caught:
        decode_runs(stream, counts_R, np.array([50, 204]))
    assert caught.value.facts["rule"] == "stream-level"


@given(st.binary(max_size=200), st.lists(st.integers(0, 50), max_size=4))
def test_any_bytes_decode_or_are_refused(stream: bytes, counts: list[int]) -> None:
    counts_R = np.array(counts, np.int64)
    try:
        values_K = decode_runs(stream, counts_R, np.full(counts_R.size, 77))
    except PayloadError:
        return
    assert values_K.size == sum(counts)
