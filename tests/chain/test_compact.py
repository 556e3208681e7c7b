"""Compaction: cheap catch-up by construction, over any distance, and measured on states that move like trained ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.chains import State, commit_state, random_state
from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import Hop, plan_between
from weightline.chain.upkeep.compact import (
    SLACK,
    AnchorPolicy,
    interpolate_direct,
    max_hops,
    plan_compact,
    plan_compaction,
    sample_bases,
    write_compaction,
)
from weightline.codec.capture import capture
from weightline.format.manifest import PayloadRef
from weightline.format.write_payload import write_delta
from weightline.store.memory import MemoryStore
from weightline.types import Segment, TensorSpec


def _hop(base: int | None, version: int, nbytes: int) -> Hop:
    return Hop(base, version, (PayloadRef(key=f"payloads/{version}", nbytes=nbytes, sha256="0" * 64, rank=0),))


@given(st.integers(1, 120), st.floats(0.1, 1.0), st.integers(1, 1000))
def test_every_distance_is_within_the_slack(tip: int, growth: float, unit: int) -> None:
    """Sizes of direct deltas grow as distance ** growth: between 0.16 and 0.83 in real runs."""
    direct = {a: unit * (tip - a) ** growth for a in range(tip)}
    hops = [_hop(v - 1, v, unit) for v in range(1, tip + 1)]
    bases = plan_compact(tip, hops, direct)
    hops += [_hop(base, tip, math.ceil(direct[base])) for base in bases]
    best: dict[int, tuple[float, int]] = {tip: (0.0, 0)}
    for base in reversed(range(tip)):
        ways = [(h.payload_nbytes + best[h.version][0], 1 + best[h.version][1]) for h in hops if h.base_version == base]
        fitting = [way for way in ways if way[1] <= max_hops(tip - base)]
        best[base] = min(fitting)
        assert best[base][0] <= SLACK * direct[base] + len(bases) + 1
    assert len(bases) < tip


@given(st.integers(0, 50), st.integers(1, 2000))
def test_samples_cover_the_range_with_few_measurements(first: int, distance: int) -> None:
    bases = sample_bases(first, first + distance)
    assert min(bases) == first
    assert max(bases) == first + distance - 1
    assert len(bases) <= 6 * math.log2(distance + 1) + 2
    sizes = interpolate_direct(first + distance, dict.fromkeys(bases, 1.0))
    assert sorted(sizes) == list(range(first, first + distance))


def test_an_anchor_is_wanted_when_deltas_outweigh_it() -> None:
    policy = AnchorPolicy(download_nbytes_per_second=1.0, delta_elements_per_second=1e9, anchor_elements_per_second=1e9)
    assert not policy.wants_anchor([_hop(None, 0, 100)], 10)
    assert not policy.wants_anchor([_hop(None, 0, 100), _hop(0, 1, 99)], 10)
    assert policy.wants_anchor([_hop(None, 0, 100), _hop(0, 1, 60), _hop(1, 2, 60)], 10)


def _direct_nbytes(folder: Path, old: State, new: State) -> int:
    """What one delta from one state to the other takes, written and measured."""
    segment = Segment(TensorSpec("weight", "BF16", (200, 200)), 0, 40_000)
    changes = capture(segment, old["weight"].reshape(-1), new["weight"].reshape(-1))
    return write_delta(folder / "direct", [changes], "gap").nbytes


def test_catch_up_to_the_tip_costs_little_more_than_the_direct_delta(tmp_path: Path) -> None:
    """40 versions of 40,000 elements. A few move often, most seldom, as in training."""
    rng = np.random.default_rng(0)
    chain = Chain(MemoryStore())
    states = [random_state(0, {"weight": (200, 200)})]
    rates = rng.permutation(np.geomspace(1e-4, 0.2, 40_000)).reshape(200, 200)
    commit_state(chain, states[0], world_size=1)
    for _ in range(40):
        state = states[-1]
        steps = np.where(rng.random((200, 200)) < rates, rng.choice([-1, 1], (200, 200)), 0)
        moved = {"weight": (state["weight"].astype(np.int32) + steps).astype(np.uint16)}
        commit_state(chain, moved, state, world_size=1)
        states.append(moved)
    before = plan_between(chain, 0, 40)
    plan = plan_compaction(chain, coding="gap")
    write_compaction(chain, plan, coding="gap")
    assert len(plan.bases) < 40
    for have in range(40):
        found = plan_between(chain, have, 40)
        assert found.payload_nbytes <= 1.3 * _direct_nbytes(tmp_path, states[have], states[40])
        assert len(found.hops) <= max_hops(40 - have)
    assert plan_between(chain, 0, 40).payload_nbytes < before.payload_nbytes / 2
