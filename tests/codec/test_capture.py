from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given

from tests.codec.states import DTYPES, RUNS, Pair, changed, pairs, random_bits, real_pairs, whole
from weightline.codec import reference
from weightline.codec.capture import capture
from weightline.codec.pieces import TILE, RankedChanges, class_field, cut
from weightline.dtypes import bits_dtype
from weightline.errors import InputError
from weightline.types import Changes


def assert_same(found: Changes, expected: Changes) -> None:
    names = ["positions_K", "old_K", "new_K"] + (["ranks_K"] if isinstance(found, RankedChanges) else [])
    for name in names:
        left, right = getattr(found, name), getattr(expected, name)
        assert left.dtype == right.dtype, name
        assert np.array_equal(left, right), name


@given(pairs())
def test_capture_is_the_reference(pair: Pair) -> None:
    expected = reference.capture(*pair)
    assert_same(capture(*pair), expected)
    assert_same(capture(*pair, ranked=True), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_elements", [0, 1, 3, 5, 63, 64, 65, 511, 512, 513, 575, 8193, 20_000])
def test_capture_at_the_edges_of_groups_and_blocks(dtype: str, num_elements: int) -> None:
    rng = np.random.default_rng(num_elements)
    old_N = random_bits(rng, dtype, num_elements)
    new_N = changed(rng, old_N, 0.3)
    segment = whole("w", dtype, num_elements)
    assert_same(capture(segment, old_N, new_N), reference.capture(segment, old_N, new_N))
    assert_same(capture(segment, old_N, new_N, ranked=True), reference.capture(segment, old_N, new_N))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F32", "F64"])
@pytest.mark.parametrize("num_classes", [1, 7, 9, 200])
def test_ranks_do_not_depend_on_which_classes_are_frequent(dtype: str, num_classes: int) -> None:
    """Nearly all elements are of some classes; others stand where a sample of the tensor does not look."""
    shift, mask = class_field(dtype)
    rng = np.random.default_rng(num_classes)
    kinds_N = rng.integers(0, min(num_classes, mask + 1), 50_001)
    kinds_N[7::1000] = mask
    old_N = (kinds_N.astype(np.uint64) << np.uint64(shift)).astype(bits_dtype(dtype))
    new_N = old_N.copy()
    at_K = np.unique(np.concatenate([np.arange(7, old_N.size, 1000), rng.integers(0, old_N.size, 150)]))
    new_N[at_K] ^= 1
    segment = whole("w", dtype, old_N.size)
    assert_same(capture(segment, old_N, new_N, ranked=True), reference.capture(segment, old_N, new_N))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "U8"])
@pytest.mark.parametrize("ranked", [False, True])
def test_capture_when_everything_changed(dtype: str, ranked: bool) -> None:
    old_N = random_bits(np.random.default_rng(1), dtype, 100_003)
    changes = capture(whole("w", dtype, old_N.size), old_N, ~old_N, ranked=ranked)
    assert np.array_equal(changes.positions_K, np.arange(old_N.size))
    assert np.array_equal(changes.old_K, old_N)
    assert np.array_equal(changes.new_K, ~old_N)


def test_capture_takes_views_that_lie_askew() -> None:
    rng = np.random.default_rng(2)
    old, new = (random_bits(rng, "BF16", 1001) for _ in range(2))
    segment = whole("w", "BF16", 990)
    for shift in range(4):
        askew = capture(segment, old[shift : shift + 990], new[3 : 3 + 990], ranked=True)
        assert_same(askew, reference.capture(segment, old[shift : shift + 990].copy(), new[3 : 3 + 990].copy()))
    strided = capture(whole("w", "BF16", 500), old[:1000:2], new[:1000:2])
    assert_same(strided, capture(whole("w", "BF16", 500), old[:1000:2].copy(), new[:1000:2].copy()))


@pytest.mark.parametrize("dtype", ["BF16", "U8"])
def test_ranks_start_afresh_in_every_tile(dtype: str) -> None:
    num_elements = TILE + 10_001
    rng = np.random.default_rng(4)
    old_N = random_bits(rng, dtype, num_elements) & bits_dtype(dtype).type(0xF3)
    new_N = old_N.copy()
    at_K = np.unique(np.concatenate([rng.integers(0, num_elements, 200), [TILE - 1, TILE, num_elements - 1]]))
    new_N[at_K] ^= 1
    segment = whole("w", dtype, num_elements)
    changes = capture(segment, old_N, new_N, ranked=True)
    assert_same(changes, reference.capture(segment, old_N, new_N))
    first, second = cut(changes)
    assert (first.segment.length, second.segment.start, second.segment.stop) == (TILE, TILE, num_elements)
    assert np.array_equal(second.positions_K + TILE, at_K[at_K >= TILE])
    assert isinstance(second, RankedChanges)
    assert_same(second, reference.capture(second.segment, old_N[TILE:], new_N[TILE:]))


def test_elements_beyond_two_to_the_31() -> None:
    num_elements = (1 << 31) + 64
    old_N, new_N = np.zeros(num_elements, np.uint8), np.zeros(num_elements, np.uint8)
    at = [0, (1 << 31) - 1, 1 << 31, num_elements - 1]
    new_N[at] = 7
    changes = capture(whole("w", "U8", num_elements), old_N, new_N)
    assert changes.positions_K.tolist() == at
    assert [piece.segment.start + int(p) for piece in cut(changes) for p in piece.positions_K] == at


@given(pairs())
def test_new_bits_lead_to_the_new_state_and_old_bits_back(pair: Pair) -> None:
    segment, old_N, new_N = pair
    baseline_N = old_N.copy()
    changes = capture(segment, old_N, new_N)
    baseline_N[changes.positions_K] = changes.new_K
    assert np.array_equal(baseline_N, new_N)
    baseline_N[changes.positions_K] = changes.old_K
    assert np.array_equal(baseline_N, old_N)


@pytest.mark.parametrize(
    "bits_N", [np.zeros(4, np.uint16), np.zeros(5, np.uint32), np.zeros((5, 1), np.uint16), np.zeros(5, np.float16)]
)
def test_arrays_of_another_length_or_width_are_refused(bits_N: np.ndarray) -> None:
    segment = whole("layer.weight", "BF16", 5)
    with pytest.raises(InputError, match=r"layer\.weight"):
        capture(segment, np.zeros(5, np.uint16), bits_N)


def test_captures_in_threads_agree() -> None:
    pair = real_pairs(RUNS[1])[0]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: capture(*pair, ranked=True), range(16)))
    for result in results:
        assert_same(result, results[0])
