"""Shortcuts that do not hold what they say: readers go round them, and a verb removes them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.chains import AT_ONCE, State, commit_state, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy, CompactionPlan, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.repair import plan_repair, write_repair
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.cli.main import app
from weightline.errors import CorruptError
from weightline.format import keys
from weightline.format.shortcut import Shortcut
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore

TIP = 8


@pytest.fixture
def states() -> list[State]:
    made: list[State] = [random_state(0)]
    for seed in range(1, TIP + 1):
        made.append(nudged(made[-1], seed))
    return made


@pytest.fixture
def chain(states: list[State]) -> Chain:
    """Versions 0 to 8, an anchor of the tip and a shortcut to it from nearly every version."""
    made = Chain(MemoryStore("memory://shortcuts"))
    for old, new in zip([None, *states], states, strict=False):
        commit_state(made, new, old)
    policy = AnchorPolicy(delta_elements_per_second=1e-9)
    write_compaction(made, plan_compaction(made, coding="gap", policy=policy), coding="gap")
    return made


def shortcuts(chain: Chain) -> list[str]:
    return [info.key for info in chain.store.list(keys.SHORTCUTS)]


def payloads(chain: Chain, key: str) -> list[str]:
    return [ref.key for ref in Shortcut.from_bytes(chain.store.get(key)).payloads]


def lose_payloads(chain: Chain, key: str) -> None:
    chain.store.delete(*payloads(chain, key))


def flip_a_bit(chain: Chain, key: str) -> None:
    (payload,) = payloads(chain, key)
    body = bytearray(chain.store.get(payload))
    body[-1] ^= 1
    chain.store.put(payload, bytes(body))


def cut_payload(chain: Chain, key: str) -> None:
    (payload,) = payloads(chain, key)
    chain.store.put(payload, chain.store.get(payload)[:-1])


def no_object(chain: Chain, key: str) -> None:
    chain.store.put(key, b"{}")


def another_object(chain: Chain, key: str) -> None:
    document = json.loads(chain.store.get(key)) | {"version": TIP + 1}
    chain.store.put(key, json.dumps(document).encode())


SPOIL: list[Callable[[Chain, str], None]] = [lose_payloads, flip_a_bit, cut_payload, no_object, another_object]


def same(chain: Chain, version: int, state: State) -> bool:
    bits = read_state(chain, version).bits
    return all(np.array_equal(bits[name], value.reshape(-1)) for name, value in state.items())


@pytest.mark.parametrize("spoil", SPOIL)
def test_readers_go_round_a_broken_shortcut(
    chain: Chain, states: list[State], spoil: Callable[[Chain, str], None]
) -> None:
    for key in shortcuts(chain):
        spoil(chain, key)
    assert same(Chain(chain.store), TIP, states[TIP])


@pytest.mark.parametrize("spoil", SPOIL)
def test_a_verb_removes_it_and_compaction_writes_it_again(
    chain: Chain, states: list[State], spoil: Callable[[Chain, str], None]
) -> None:
    before = shortcuts(chain)
    broken = keys.shortcut(None, TIP)
    spoil(chain, broken)
    for _ in range(2):  # deep findings come once the others are gone
        repair = plan_repair(verify_chain(Chain(chain.store)).findings)
        assert repair.left == ()
        write_repair(chain, repair)
    assert shortcuts(chain) == [key for key in before if key != broken]
    assert verify_chain(Chain(chain.store)).holds
    write_compaction(Chain(chain.store), CompactionPlan(TIP, (), {}, writes_anchor=True), coding="ordered-pco")
    assert shortcuts(chain) == before
    assert verify_chain(Chain(chain.store)).holds
    assert same(Chain(chain.store), TIP, states[TIP])


def test_history_does_not_expire_behind_a_broken_anchor(chain: Chain, states: list[State]) -> None:
    lose_payloads(chain, keys.shortcut(None, TIP))
    with pytest.raises(CorruptError, match="weightline repair"):
        expire_before(Chain(chain.store), TIP)
    write_repair(chain, plan_repair(verify_chain(Chain(chain.store)).findings))
    expire_before(Chain(chain.store), TIP)
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    assert same(Chain(chain.store), TIP, states[TIP])


def test_gc_keeps_the_deltas_that_an_anchor_replaced_when_it_breaks(chain: Chain, states: list[State]) -> None:
    expire_before(chain, TIP)
    lose_payloads(chain, keys.shortcut(None, TIP))
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    assert same(Chain(chain.store), TIP, states[TIP])


def test_gc_collects_nothing_while_a_shortcut_cannot_be_read(chain: Chain) -> None:
    no_object(chain, keys.shortcut(None, TIP))
    with pytest.raises(CorruptError, match="weightline repair"):
        view_chain(chain)


def test_a_replica_goes_round_too(chain: Chain, states: list[State]) -> None:
    """The state that moves is torn by the failure and begun anew."""
    from weightline.chain.replay.state import advance_state

    plan = plan_between(chain, 2, TIP)
    assert plan.hops[0].is_shortcut
    state = read_state(chain, 2)
    for key in shortcuts(chain):
        flip_a_bit(chain, key)
    advance_state(Chain(chain.store), state, TIP)
    assert all(np.array_equal(state.bits[name], bits.reshape(-1)) for name, bits in states[TIP].items())


def test_the_command_says_first_what_it_would_remove(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bucket")
    chain, state = Chain(LocalStore(folder)), random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    write_compaction(chain, CompactionPlan(1, (), {}, writes_anchor=True), coding="ordered-pco")
    lose_payloads(chain, keys.shortcut(None, 1))
    looked = CliRunner().invoke(app, ["repair", str(folder)])
    assert looked.exit_code == 0, looked.output
    assert "would be removed" in looked.output
    assert shortcuts(chain) == [keys.shortcut(None, 1)]
    assert CliRunner().invoke(app, ["repair", str(folder), "--delete"]).exit_code == 0
    assert shortcuts(chain) == []
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
