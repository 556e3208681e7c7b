"""A chain from the outside: commit, read, replay, pull, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.chains import commit_state, make_manifest, nudged, random_state, restate
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, read_record, read_records, write_record
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import advance_state, read_state
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.errors import (
    ChainEmptyError,
    CommitConflictError,
    DigestMismatchError,
    InputError,
    ManifestError,
    VersionNotFoundError,
)
from weightline.format import keys
from weightline.format.manifest import FORMAT_1, FORMAT_2
from weightline.store.memory import MemoryStore


@pytest.fixture
def chain() -> Chain:
    return Chain(MemoryStore("memory://bucket/toy"))


def _grow(chain: Chain, num_versions: int) -> list[dict[str, np.ndarray]]:
    states = [random_state(0)]
    commit_state(chain, states[0])
    for version in range(1, num_versions):
        states.append(nudged(states[-1], version))
        commit_state(chain, states[-1], states[-2], world_size=1 + version % 3)
    return states


def test_every_version_replays_to_its_bits(chain: Chain) -> None:
    states = _grow(chain, 6)
    for version, expected in enumerate(states):
        state = read_state(Chain(chain.store), version)
        assert set(state.bits) == set(expected)
        assert all(np.array_equal(state.bits[n], expected[n].reshape(-1)) for n in expected)


def test_advancing_equals_reading(chain: Chain) -> None:
    states = _grow(chain, 5)
    state = read_state(chain, 1)
    advance_state(chain, state, 4)
    assert all(np.array_equal(state.bits[n], b.reshape(-1)) for n, b in states[4].items())


def test_select_reads_only_what_is_asked(chain: Chain) -> None:
    states = _grow(chain, 3)
    state = read_state(chain, 2, lambda name: name == "model.norm.weight")
    assert list(state.bits) == ["model.norm.weight"]
    assert np.array_equal(state.bits["model.norm.weight"], states[2]["model.norm.weight"])


def test_empty_delta_is_a_version(chain: Chain) -> None:
    state = random_state(0)
    commit_state(chain, state)
    manifest = commit_state(chain, state, state)
    assert manifest.num_changed == 0
    assert read_state(chain, 1).version == 1


def test_tip_with_missing_stale_and_broken_hint(chain: Chain) -> None:
    assert chain.tip_version() is None
    with pytest.raises(ChainEmptyError):
        chain.tip()
    _grow(chain, 4)
    for hint in (None, b'{"version": 1}', b"not json", b'{"version": 99}', b'{"version": "2"}'):
        chain.store.delete(keys.TIP_HINT) if hint is None else chain.store.put(keys.TIP_HINT, hint)
        assert chain.tip_version() == 3


def test_unknown_version_names_the_tip(chain: Chain) -> None:
    _grow(chain, 2)
    with pytest.raises(VersionNotFoundError, match="tip is 1"):
        chain.manifest(7)


def test_loser_of_a_race_is_told_the_winner(chain: Chain) -> None:
    states = _grow(chain, 2)
    late = make_manifest(states[1], 1, new_commit_id(), (), is_anchor=False)
    with pytest.raises(CommitConflictError) as caught:
        commit_manifest(Chain(chain.store), late)
    assert caught.value.facts["winner"] == chain.manifest(1).commit_id


def test_a_lost_reply_is_recognised(chain: Chain) -> None:
    _grow(chain, 2)
    commit_manifest(Chain(chain.store), chain.manifest(1))
    assert chain.tip_version() == 1


def test_versions_are_contiguous(chain: Chain) -> None:
    states = _grow(chain, 2)
    with pytest.raises(InputError, match="no version 4"):
        commit_manifest(chain, make_manifest(states[1], 5, new_commit_id(), (), is_anchor=False))


def test_flipped_payload_bit_is_refused(chain: Chain) -> None:
    _grow(chain, 2)
    key = chain.manifest(1).payloads[0].key
    body = bytearray(chain.store.get(key))
    body[-1] ^= 1
    chain.store.put(key, bytes(body))
    with pytest.raises(DigestMismatchError, match="sha256"):
        read_state(chain, 1)


@pytest.mark.parametrize("written_as", [FORMAT_1, FORMAT_2])
def test_wrong_state_digest_is_refused(chain: Chain, written_as: str) -> None:
    state = random_state(0)
    commit_state(chain, state, written_as=written_as)
    commit_state(chain, nudged(state, 1), state, written_as=written_as)
    restate(chain, 1, {"model.norm.weight": 0})
    with pytest.raises(DigestMismatchError, match=r"model\.norm\.weight"):
        read_state(Chain(chain.store), 1)


def test_a_manifest_under_a_foreign_key_is_refused(chain: Chain) -> None:
    _grow(chain, 2)
    chain.store.put(keys.commit(2), chain.store.get(keys.commit(1)))
    with pytest.raises(ManifestError, match="version 1"):
        chain.manifest(2)


def test_plan_takes_the_cheapest_way(chain: Chain) -> None:
    _grow(chain, 4)
    assert [h.version for h in plan_between(chain, None, 2).hops] == [0, 1, 2]
    assert [h.version for h in plan_between(chain, 1, 3).hops] == [2, 3]
    assert plan_between(chain, 3, 3).hops == ()
    with pytest.raises(VersionNotFoundError):
        plan_between(chain, None, 9)


def test_plan_backwards_walks_the_deltas_or_goes_through_an_anchor(chain: Chain) -> None:
    states = _grow(chain, 4)
    assert [h.target for h in plan_between(chain, 3, 1).hops] == [2, 1]
    state = read_state(chain, 3)
    advance_state(chain, state, 1)
    assert all(np.array_equal(state.bits[n], b.reshape(-1)) for n, b in states[1].items())
    assert [h.target for h in plan_between(chain, 3, 0).hops] == [0]


def test_pull_writes_a_folder_once(chain: Chain, tmp_path: Path) -> None:
    states = _grow(chain, 3)
    out = tmp_path / "v2"
    write_checkpoint(chain, 2, out)
    write_checkpoint(chain, 2, out)
    loaded = load_file(out / "model.safetensors")
    assert all(np.array_equal(loaded[n].view(torch.int16).numpy().view(np.uint16), b) for n, b in states[2].items())
    with pytest.raises(InputError, match="not empty"):
        write_checkpoint(chain, 1, out)


def test_the_first_record_stands(chain: Chain) -> None:
    _grow(chain, 1)
    first = write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "done", "score": 0.5})
    second = write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "failed"})
    assert second == first == read_record(chain, EVALUATIONS, 0, "arithmetic")
    assert read_records(chain, EVALUATIONS) == [first]
    assert read_record(chain, EVALUATIONS, 1, "arithmetic") is None
