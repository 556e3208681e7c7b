"""Compaction: cheap catch-up by construction, over any distance, and measured on states that move like trained ones."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chains import State, commit_state, random_state
from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import Hop, plan_between
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.compact_plan import (
    REQUEST_NBYTES,
    SLACK,
    first_base,
    interpolate_direct,
    max_hops,
    plan_compact,
    sample_bases,
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
    bases = plan_compact(tip, hops, direct, 0)
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


def test_versions_that_are_mostly_header_get_few_shortcuts() -> None:
    """Payloads of 362 bytes: each direct delta saves bytes, and none saves a request's worth."""
    tip = 3000
    hops = [_hop(version - 1, version, 362) for version in range(1, tip + 1)]
    direct = {base: 362.0 + (tip - base) for base in range(tip)}
    bases = plan_compact(tip, hops, direct)
    assert 0 < len(bases) <= tip / 16
    best = {tip: (0.0, 0)}
    shortcuts = {base: _hop(base, tip, math.ceil(direct[base])) for base in bases}
    for base in reversed(range(tip)):
        ways = [hop for hop in (hops[base], shortcuts.get(base)) if hop is not None]
        best[base] = min(
            way
            for hop in ways
            if (way := (hop.payload_nbytes + best[hop.version][0], 1 + best[hop.version][1]))[1] <= max_hops(tip - base)
        )
        assert best[base][0] <= direct[base] + REQUEST_NBYTES


def _grown(num_versions: int, every: int, growth: float, unit: int) -> tuple[list[int], list[int], float]:
    """Compacts a chain every so many versions, and returns the numbers of versions looked at, of shortcuts, the excess.

    The excess is that of the worst reader at any compaction's tip: bytes over 1.3 times those of the direct delta and a
    request's worth.
    """
    leaving: dict[int, list[Hop]] = {v - 1: [_hop(v - 1, v, unit)] for v in range(1, num_versions + 1)}
    sizes: dict[int, float] = {}
    previous, looked, written, worst = None, [], [], 0.0
    for tip in range(every, num_versions + 1, every):
        first = first_base(tip, previous, sizes, REQUEST_NBYTES)
        direct = {base: unit * (tip - base) ** growth for base in range(first, tip)}
        hops = [hop for base in direct for hop in leaving[base] if hop.version <= tip]
        bases = plan_compact(tip, hops, direct)
        for base in bases:
            leaving[base].append(_hop(base, tip, math.ceil(direct[base])))
        looked.append(tip - first)
        written.append(len(bases))
        previous = tip if bases else previous
        nearest = {(tip - base).bit_length(): base for base in sorted(bases)}
        sizes = {tip - base: direct[base] for base in nearest.values()} if bases else sizes
        best = {tip: 0.0}
        for base in reversed(range(tip)):
            best[base] = min(hop.payload_nbytes + best[hop.version] for hop in leaving[base] if hop.version <= tip)
            exact = unit * (tip - base) ** growth
            worst = max(worst, (best[base] - REQUEST_NBYTES) / exact)
    return looked, written, worst


@pytest.mark.parametrize(("growth", "unit"), [(1.0, 362), (0.95, 10_000_000), (0.8, 10_000_000), (0.5, 500_000)])
def test_every_reader_catches_up_cheaply_from_a_chain_that_is_compacted_as_it_grows(growth: float, unit: int) -> None:
    """Over any distance, although a compaction does not look at all of history."""
    _, written, worst = _grown(1024, 32, growth, unit)
    assert worst <= 1.3
    assert sum(written) <= 1024 * math.log2(1024)


def test_a_compaction_costs_what_is_new() -> None:
    """The versions that are looked at, in all, grow with the logarithm for each version, not with the chain."""
    for unit, growth in ((362, 1.0), (10_000_000, 1.0)):
        per_version = []
        for num_versions in (1024, 4096):
            looked, _, _ = _grown(num_versions, 32, growth, unit)
            per_version.append(sum(looked) / num_versions)
        assert per_version[1] <= 1.25 * per_version[0] + 20


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
    plan = plan_compaction(chain, coding="gap", least_saving_nbytes=0)
    write_compaction(chain, plan, coding="gap")
    assert len(plan.bases) < 40
    for have in range(40):
        found = plan_between(chain, have, 40)
        assert found.payload_nbytes <= 1.3 * _direct_nbytes(tmp_path, states[have], states[40])
        assert len(found.hops) <= max_hops(40 - have)
    assert plan_between(chain, 0, 40).payload_nbytes < before.payload_nbytes / 2
