"""A revert costs what changed between two states: the deltas between them, or one replay of the tensors that differ."""

from __future__ import annotations

import numpy as np
import pytest

from tests.chain.counting import CountingStore
from tests.chains import State, commit_state, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import CompactionPlan, write_compaction
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.revert import commit_revert
from weightline.errors import InputError
from weightline.store.memory import MemoryStore

SHAPES = {"a": (40, 8), "b": (300,), "frozen": (64,), "one": ()}
TIP = 4


def _moved(state: State, seed: int) -> State:
    moved = nudged(state, seed, 0.2)
    return {name: state[name] if name == "frozen" else bits for name, bits in moved.items()}


def _grow(coding: str, world_size: int) -> tuple[Chain, CountingStore, list[State]]:
    store = CountingStore(MemoryStore("memory://reverted"))
    chain = Chain(store)
    states: list[State] = [random_state(0, SHAPES)]
    commit_state(chain, states[0], world_size=world_size, coding=coding)
    for seed in range(1, TIP + 1):
        states.append(_moved(states[-1], seed))
        commit_state(chain, states[-1], states[-2], world_size=world_size, coding=coding)
    store.reset()
    return Chain(store), store, states


def _payloads_read(store: CountingStore) -> set[int]:
    """The versions whose payloads were fetched."""
    return {int(key.split("/")[1]) for (verb, key), n in store.keys.items() if verb == "get_file" and n}


def _same(chain: Chain, version: int, state: State) -> bool:
    bits = read_state(Chain(chain.store), version).bits
    return all(np.array_equal(bits[name], expected.reshape(-1)) for name, expected in state.items())


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_chain_of_gap_is_reverted_by_its_deltas_alone(version: int, world_size: int) -> None:
    chain, store, states = _grow("gap", world_size)
    manifest = commit_revert(chain, version)
    assert (manifest.kind, manifest.coding, manifest.reverts_to) == ("revert", "gap", version)
    assert _payloads_read(store) == set(range(version + 1, TIP + 1))
    assert _same(chain, TIP + 1, states[version])
    assert verify_chain(Chain(store)).holds


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_chain_of_another_coding_is_reverted_by_one_replay(version: int, world_size: int) -> None:
    chain, store, states = _grow("gap-by-magnitude", world_size)
    manifest = commit_revert(chain, version)
    assert manifest.coding == "gap-by-magnitude"
    assert _payloads_read(store) == set(range(TIP + 1))
    assert max(n for (verb, _), n in store.keys.items() if verb == "get_file") == 1
    assert _same(chain, TIP + 1, states[version])
    assert verify_chain(Chain(store)).holds


@pytest.mark.parametrize("coding", ["gap", "gap-by-magnitude"])
def test_a_revert_is_written_in_the_coding_that_is_named(coding: str) -> None:
    for written_in in ("gap", "gap-by-magnitude"):
        chain, _, states = _grow(written_in, 2)
        assert commit_revert(chain, 1, coding=coding).coding == coding
        assert _same(chain, TIP + 1, states[1])


@pytest.mark.parametrize("coding", ["gap", "gap-by-magnitude"])
def test_what_did_not_change_between_the_two_states_is_not_read(coding: str) -> None:
    """The state of the tip is that of version 2 again, so that nothing is fetched at all."""
    chain, store, states = _grow(coding, 2)
    commit_revert(chain, 2)
    store.reset()
    manifest = commit_revert(Chain(store), 2)
    assert (manifest.num_changed, manifest.payloads) == (0, ())
    assert _payloads_read(store) == set()
    assert _same(chain, TIP + 2, states[2])


def test_no_version_stands_on_a_shortcut() -> None:
    """Readers go round a wrong shortcut. A revert made from it would be a version of wrong bits."""
    chain, store, states = _grow("gap", 1)
    plan = CompactionPlan(TIP, (0,), {}, writes_anchor=False)
    write_compaction(chain, plan, coding="gap")
    store.reset()
    commit_revert(Chain(store), 0)
    assert 0 in _payloads_read(store), "the states were read and checked"
    assert _same(chain, TIP + 1, states[0])


def test_the_tip_is_not_reverted_to() -> None:
    chain, _, _ = _grow("gap", 1)
    with pytest.raises(InputError, match="nothing to revert"):
        commit_revert(chain, TIP)
