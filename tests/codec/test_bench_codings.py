from __future__ import annotations

import numpy as np
import pytest

from tests.codec.states import RUNS, changed, random_bits, real_pairs
from weightline.bench.codings import bench_codings
from weightline.bench.peers import bench_peers, peer_layouts
from weightline.codec.coding import codings
from weightline.types import TensorSpec


def test_every_coding_is_measured_and_exact() -> None:
    pairs = [(segment.tensor, old_N, new_N) for segment, old_N, new_N in real_pairs(RUNS[0])]
    results = bench_codings(pairs, repeats=1)
    assert [result.coding for result in results] == list(codings())
    for result in results:
        assert result.exact
        assert result.num_changed == sum(np.count_nonzero(old_N != new_N) for _, old_N, new_N in pairs)
        assert result.num_elements == sum(tensor.num_elements for tensor, _, _ in pairs)
        assert result.bytes_per_changed == result.payload_nbytes / result.num_changed
        seconds = (
            result.capture_seconds, result.encode_seconds, result.decode_seconds,
            result.apply_seconds, result.memcmp_seconds,
        )  # fmt: skip
        assert min(seconds) > 0


@pytest.mark.parametrize("run", RUNS)
def test_peers_are_exact_and_larger(run: str) -> None:
    pytest.importorskip("zstandard")
    pairs = [(segment.tensor, old_N, new_N) for segment, old_N, new_N in real_pairs(run)]
    ours = {result.coding: result.payload_nbytes for result in bench_codings(pairs, repeats=1)}
    for result in bench_peers(pairs):
        assert result.exact, result.layout
        assert result.payload_nbytes > max(ours.values()), result.layout


def test_peers_take_any_width_and_wide_gaps() -> None:
    pytest.importorskip("zstandard")
    rng = np.random.default_rng(1)
    for dtype in ("F8_E4M3", "BF16", "F32"):
        old_N = random_bits(rng, dtype, 200_000)
        new_N = old_N.copy()
        new_N[[0, 150_000, 199_999]] ^= 1
        for state_N in (new_N, old_N, changed(rng, old_N, 0.2)):
            results = bench_peers([(TensorSpec("w", dtype, (200_000,)), old_N, state_N)])
            assert [result.system for result in results] == [layout.system for layout in peer_layouts()]
            assert all(result.exact for result in results)
