"""The cost model of `weightline plan-cluster` against payloads that were really written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.codec.states import RUNS, real_pairs
from weightline.bench.cluster import CODING_FACTORS, Cluster, bytes_per_changed, plan_cluster
from weightline.codec.capture import capture
from weightline.format.payload import PayloadInfo, write_delta
from weightline.types import Segment, TensorSpec

#: The small states are laid end to end this often: a real payload's fixed bytes are nothing beside its streams.
_REPEATS = 40
_TOLERANCE = 0.15


def measured(path: Path, run: str, coding: str) -> PayloadInfo:
    """The payload of a run's step, all tensors of it as one."""
    pairs = real_pairs(run)
    old_N, new_N = (np.tile(np.concatenate([pair[at] for pair in pairs]), _REPEATS) for at in (1, 2))
    segment = Segment(TensorSpec("all", "BF16", (old_N.size,)), 0, old_N.size)
    return write_delta(path, [capture(segment, old_N, new_N, ranked=True)], coding)


@pytest.mark.parametrize("coding", sorted(CODING_FACTORS))
@pytest.mark.parametrize("run", RUNS)
def test_bytes_per_changed_element(tmp_path: Path, run: str, coding: str) -> None:
    info = measured(tmp_path / "p", run, coding)
    modelled = bytes_per_changed(info.num_changed / info.num_elements, coding)
    assert modelled == pytest.approx(info.nbytes / info.num_changed, rel=_TOLERANCE)


@pytest.mark.parametrize("coding", sorted(CODING_FACTORS))
def test_delta_of_a_whole_plan(tmp_path: Path, coding: str) -> None:
    info = measured(tmp_path / "p", RUNS[1], coding)
    density = info.num_changed / info.num_elements
    cost = plan_cluster(Cluster(num_params=info.num_elements, num_ranks=4, density=density, coding=coding))
    assert cost.delta_nbytes == pytest.approx(info.nbytes, rel=_TOLERANCE)
    assert cost.delta_nbytes_per_rank * 4 == pytest.approx(cost.delta_nbytes)
    assert cost.full_nbytes == 2 * info.num_elements
    assert cost.ratio_to_full == pytest.approx(cost.delta_nbytes / cost.full_nbytes)


def test_the_model_knows_the_order_of_the_codings() -> None:
    """As measured on every run: what the receiver knows of magnitudes saves about a quarter."""
    for density in (0.001, 0.0065, 0.0164, 0.043):
        assert bytes_per_changed(density, "gap-by-magnitude") < 0.8 * bytes_per_changed(density, "gap")
