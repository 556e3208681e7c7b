"""A replica on a real model: it moves to the exact bits, and never serves anything that it did not check."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.chains import commit_state
from tests.serving.model_chains import (
    ModelChain,
    assert_same_bits,
    build_model,
    engine_bits,
    fresh_bits,
    make_chain,
    state_of,
    trained,
)
from weightline.errors import (
    ApplyError,
    BaseMismatchError,
    ChainEmptyError,
    DigestMismatchError,
    InputError,
    VersionNotFoundError,
)
from weightline.format import keys as keys_of_objects
from weightline.format.manifest import AssetRef
from weightline.serving.engines.base import GenerationRequest
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.replica.prepare import PreparedDelta, PreparedLoad
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import Mark, read_mark
from weightline.store.memory import MemoryStore
from weightline.types import Changes

ASK = GenerationRequest(prompts=("12+34=",), max_tokens=8)


def _engine(replica: Replica) -> TransformersEngine:
    assert isinstance(replica.engine, TransformersEngine)
    return replica.engine


def _assert_serves(replica: Replica, grown: ModelChain, version: int, tmp_path: Path) -> None:
    """The bits are those of a fresh load, and both the mark and every answer say so."""
    fresh = fresh_bits(grown.chain, version, tmp_path / f"fresh-{uuid.uuid4().hex}")
    assert_same_bits(engine_bits(_engine(replica)), fresh)
    assert replica.engine.generate(ASK).version == version
    mark = read_mark(replica.state_dir)
    assert mark is not None
    assert (mark.status, mark.version) == ("checked", version)
    assert mark.commit_id == grown.chain.manifest(version).commit_id
    assert replica.status().state == "serving"


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-tied", "llama"])
def test_a_refresh_equals_a_fresh_load_bit_for_bit(kind: str, tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", kind, num_versions=4)
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    for version in (0, 1, 3):
        facts = replica.refresh(version)
        assert facts.version == version
        _assert_serves(replica, grown, version, tmp_path)
    replica.refresh(1, allow_backward=True)
    _assert_serves(replica, grown, 1, tmp_path)


def test_the_storage_of_the_weights_stays_where_it_is(replica: Replica) -> None:
    before = {name: replica.engine.read_bits(name).ctypes.data for name in replica.engine.specs()}
    replica.refresh(2)
    assert {name: replica.engine.read_bits(name).ctypes.data for name in replica.engine.specs()} == before


def test_facts_tell_what_moved(replica: Replica, grown: ModelChain) -> None:
    facts = replica.refresh(1)
    manifest = grown.chain.manifest(1)
    assert (facts.from_version, facts.version, facts.commit_id) == (0, 1, manifest.commit_id)
    assert facts.num_changed == manifest.num_changed > 0
    assert facts.payload_nbytes == manifest.payload_nbytes
    assert facts.pause_seconds > 0
    parts = (facts.fetch_seconds, facts.read_base_seconds, facts.decode_seconds)
    assert min(parts) > 0
    assert facts.prepare_seconds > sum(parts)
    assert facts.stage_seconds > 0


def test_several_deltas_are_one_write(replica: Replica, grown: ModelChain) -> None:
    """Composed: an element that two versions touch is written once, one that came back not at all."""
    facts = replica.refresh(2)
    expected = sum(np.count_nonzero(grown.states[0][name] != bits) for name, bits in grown.states[2].items())
    assert facts.num_changed == expected
    assert facts.payload_nbytes == sum(grown.chain.manifest(v).payload_nbytes for v in (1, 2))


def test_a_late_joiner_loads_any_version_from_nothing(grown: ModelChain, tmp_path: Path) -> None:
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "late")
    facts = replica.refresh(2)
    assert facts.from_version is None
    _assert_serves(replica, grown, 2, tmp_path)
    assert {path.name for path in replica.state_dir.iterdir()} == {"replica.json"}


def test_a_later_anchor_is_applied_in_place(replica: Replica, grown: ModelChain, tmp_path: Path) -> None:
    """Where an anchor is the cheaper way, or the only one, what differs is written: no reload."""
    grown.grow(trained(grown.states[-1], 99), as_anchor=True)
    assert isinstance(replica.prepare(3), PreparedDelta)
    replica.refresh(3)
    _assert_serves(replica, grown, 3, tmp_path)


def test_repeating_a_refresh_moves_nothing(replica: Replica) -> None:
    first = replica.refresh(2)
    again = replica.refresh(2)
    assert (again.from_version, again.num_changed, again.pause_seconds) == (2, 0, 0)
    assert again.served_at == first.served_at


def test_an_older_version_does_not_pull_a_replica_back_unless_told(replica: Replica) -> None:
    replica.refresh(2)
    assert replica.refresh(1).version == 2
    assert replica.refresh(1, allow_backward=True).version == 1
    assert replica.version == 1


def test_the_tip_is_the_default(replica: Replica) -> None:
    assert replica.refresh().version == 2


def test_an_unknown_version_and_an_empty_chain_say_so(replica: Replica, tmp_path: Path) -> None:
    with pytest.raises(VersionNotFoundError, match="has no version 7; its tip is 2"):
        replica.refresh(7)
    assert replica.version == 0
    empty = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=0)
    waiting = Replica(empty.chain, TransformersEngine("cpu"), tmp_path / "empty", "replica-1")
    with pytest.raises(ChainEmptyError):
        waiting.refresh()
    assert waiting.status().state == "waiting"
    with pytest.raises(ApplyError, match="no checked version is loaded"):
        waiting.engine.generate(ASK)


def test_the_base_is_checked_by_its_digest_not_by_its_number(replica: Replica, tmp_path: Path) -> None:
    """The bucket now holds another run's chain, with the same numbers."""
    store = replica.chain.store
    assert isinstance(store, MemoryStore)
    other = make_chain(f"memory://{uuid.uuid4().hex}/toy", "qwen3", num_versions=0)
    other.grow(state_of(build_model("qwen3", seed=1)))
    other.grow()
    before = engine_bits(_engine(replica))
    for info in list(store.list("")):
        store.delete(info.key)
    for info in other.chain.store.list(""):
        store.put(info.key, other.chain.store.get(info.key))
    with pytest.raises(BaseMismatchError, match="the replica's weights are not version 0"):
        replica.refresh(1)
    assert_same_bits(engine_bits(_engine(replica)), before)
    assert replica.engine.generate(ASK).version == 0


def test_weights_that_changed_behind_the_replicas_back_are_noticed_before_anything_is_written(
    replica: Replica, grown: ModelChain
) -> None:
    """One flipped bit in an element that the delta touches: the result would not have the manifest's digest."""
    prepared = replica.prepare(1)
    assert isinstance(prepared, PreparedDelta)
    victim = prepared.changes[0]
    replica.engine.read_bits(victim.segment.tensor.name)[victim.positions_K[0]] ^= 1
    before = engine_bits(_engine(replica))
    with pytest.raises(DigestMismatchError):
        replica.refresh(1)
    assert_same_bits(engine_bits(_engine(replica)), before)
    assert read_mark(replica.state_dir).status == "checked"


def test_a_damaged_payload_moves_nothing(replica: Replica, grown: ModelChain, tmp_path: Path) -> None:
    payload = grown.chain.manifest(1).payloads[1]
    raw = bytearray(grown.chain.store.get(payload.key))
    raw[-9] ^= 4
    grown.chain.store.put(payload.key, bytes(raw))
    with pytest.raises(DigestMismatchError, match="sha256"):
        replica.refresh(1)
    _assert_serves(replica, grown, 0, tmp_path)
    assert "sha256" in replica.status().last_error


def test_what_was_prepared_for_another_state_is_refused(replica: Replica, grown: ModelChain, tmp_path: Path) -> None:
    prepared = replica.prepare(1)
    replica.refresh(2)
    with pytest.raises(BaseMismatchError, match="prepare it again"):
        replica.apply(prepared)
    _assert_serves(replica, grown, 2, tmp_path)


def _commit_with_tokenizer(grown: ModelChain, **keys: object) -> int:
    """Commits a step of training whose tokenizer configuration has these keys as well."""
    (old,) = (asset for asset in grown.assets if asset.name == "tokenizer_config.json")
    body = json.dumps(json.loads(grown.chain.store.get(old.key)) | keys).encode()
    changed = AssetRef(key=keys_of_objects.asset(_sha256(body)), nbytes=len(body), sha256=_sha256(body), name=old.name)
    grown.chain.store.put(changed.key, body)
    grown.assets = tuple(changed if asset == old else asset for asset in grown.assets)
    new = trained(grown.states[-1], 77)
    commit_state(grown.chain, new, grown.states[-1], assets=grown.assets)
    grown.states.append(new)
    return grown.chain.tip().version


def test_changed_tokenizer_files_mean_a_load(replica: Replica, grown: ModelChain, tmp_path: Path) -> None:
    version = _commit_with_tokenizer(grown, model_max_length=7)
    prepared = replica.prepare(version)
    assert isinstance(prepared, PreparedLoad)
    prepared.discard()
    replica.refresh(version)
    _assert_serves(replica, grown, version, tmp_path)


def test_tokenizer_files_that_say_the_same_mean_no_load(replica: Replica, grown: ModelChain, tmp_path: Path) -> None:
    version = _commit_with_tokenizer(grown, local_files_only=True, transformers_version="0.0.0", name_or_path="/x")
    assert isinstance(replica.prepare(version), PreparedDelta)
    replica.refresh(version)
    _assert_serves(replica, grown, version, tmp_path)


def test_a_state_folder_belongs_to_one_chain(replica: Replica) -> None:
    other = make_chain(f"memory://{uuid.uuid4().hex}/other")
    with pytest.raises(InputError, match="belongs to a replica of"):
        Replica(other.chain, TransformersEngine("cpu"), replica.state_dir, "replica-0")


class _Tearing(TransformersEngine):
    """Raises at chosen calls of scatter_tensor and load, before, or in the middle of, their write."""

    def __init__(self, fails_at: Callable[[int], bool]) -> None:
        super().__init__("cpu")
        self.num_scatters = 0
        self.fails_at: Callable[[int], bool] = lambda _: False
        self.arm = lambda: setattr(self, "fails_at", fails_at)
        self.loads_fail = False

    def scatter_tensor(self, changes: Changes) -> None:
        call, self.num_scatters = self.num_scatters, self.num_scatters + 1
        if self.fails_at(call):
            half = changes.num_changed // 2
            super().scatter_tensor(
                Changes(changes.segment, changes.positions_K[:half], changes.old_K[:half], changes.new_K[:half])
            )
            raise RuntimeError(f"torn at {call}")
        super().scatter_tensor(changes)

    def load(self, folder: Path) -> None:
        if self.loads_fail:
            raise ApplyError("the loader is broken")
        super().load(folder)


def test_a_bucket_that_was_made_anew_is_not_taken_for_the_one_that_is_served(tmp_path: Path) -> None:
    """Same URL, same number, another commit."""
    url = f"memory://{uuid.uuid4().hex}/toy"
    grown = make_chain(url, num_versions=2)
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    replica.refresh(1)
    for info in list(grown.chain.store.list("")):
        grown.chain.store.delete(info.key)
    make_chain(url, num_versions=2)
    for version in (1, 0):
        with pytest.raises(BaseMismatchError, match="the chain has commit"):
            replica.refresh(version)
    assert replica.status().version == 1


def _tearing(grown: ModelChain, tmp_path: Path, fails_at: Callable[[int], bool]) -> tuple[Replica, _Tearing]:
    engine = _Tearing(fails_at)
    replica = Replica(grown.chain, engine, tmp_path / f"state-{uuid.uuid4().hex}", "replica-0")
    replica.refresh(0)
    engine.arm()
    return replica, engine


def test_an_apply_torn_at_any_write_is_undone(grown: ModelChain, tmp_path: Path) -> None:
    base = fresh_bits(grown.chain, 0, tmp_path / "base")
    replica, engine = _tearing(grown, tmp_path, lambda _: False)
    num_tensors = len(grown.chain.manifest(1).tensors)
    for torn_at in range(num_tensors):
        engine.num_scatters = 0
        engine.fails_at = lambda call, at=torn_at: call == at
        with pytest.raises(ApplyError, match=f"torn at {torn_at}"):
            replica.refresh(1)
        assert_same_bits(engine_bits(engine), base)
        assert engine.generate(ASK).version == 0
        mark = read_mark(replica.state_dir)
        assert mark is not None
        assert (mark.status, mark.version) == ("checked", 0)
    engine.fails_at = lambda _: False
    replica.refresh(1)
    _assert_serves(replica, grown, 1, tmp_path)


def test_when_the_way_back_is_torn_too_the_version_is_loaded_again(grown: ModelChain, tmp_path: Path) -> None:
    replica, _ = _tearing(grown, tmp_path, lambda call: call >= 3)
    with pytest.raises(ApplyError, match="torn at"):
        replica.refresh(2)
    _assert_serves(replica, grown, 0, tmp_path)


def test_when_nothing_works_nothing_is_served_until_something_does(grown: ModelChain, tmp_path: Path) -> None:
    replica, engine = _tearing(grown, tmp_path, lambda call: call >= 3)
    engine.loads_fail = True
    with pytest.raises(ApplyError, match="could neither move nor return to version 0, and serves no version"):
        replica.refresh(2)
    with pytest.raises(ApplyError, match="no checked version is loaded"):
        engine.generate(ASK)
    assert replica.status().state == "waiting"
    assert read_mark(replica.state_dir).status == "moving"
    engine.loads_fail = False
    replica.refresh(1)
    _assert_serves(replica, grown, 1, tmp_path)


class _Forgetful(TransformersEngine):
    """Loses the last write of every scatter while `loses` is set, and says nothing."""

    loses = False

    def scatter(self, changes: Sequence[Changes]) -> None:
        super().scatter(changes[:-1] if self.loses else changes)


def test_an_engine_that_loses_a_write_is_caught_by_reading_back(grown: ModelChain, tmp_path: Path) -> None:
    engine = _Forgetful("cpu")
    replica = Replica(grown.chain, engine, tmp_path / "state", "replica-0")
    replica.refresh(0)
    engine.loses = True
    with pytest.raises(DigestMismatchError, match="did not take the bits that were written"):
        replica.refresh(1)
    # The way back loses the same write, which was not written on the way there: version 0 is whole.
    _assert_serves(replica, grown, 0, tmp_path)


class _Flipping(TransformersEngine):
    """Loads one bit wrong."""

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.read_bits("model.norm.weight")[3] ^= 1


def test_loaded_weights_are_proven_too(grown: ModelChain, tmp_path: Path) -> None:
    replica = Replica(grown.chain, _Flipping("cpu"), tmp_path / "state", "replica-0")
    with pytest.raises(DigestMismatchError, match=r"tensor model\.norm\.weight"):
        replica.refresh(0)
    assert replica.version is None
    assert replica.status().state == "waiting"


class _Watching(TransformersEngine):
    """Keeps what version, and what mark, stood while weights were written."""

    state_dir: Path

    def __init__(self) -> None:
        super().__init__("cpu")
        self.seen: list[tuple[int | None, str, int | None, int | None]] = []

    def scatter_tensor(self, changes: Changes) -> None:
        mark = read_mark(self.state_dir)
        assert mark is not None
        self.seen.append((self.version, mark.status, mark.version, mark.moving_to))
        super().scatter_tensor(changes)


def test_the_mark_is_withdrawn_before_the_first_write_and_stays_so_until_the_last(
    grown: ModelChain, tmp_path: Path
) -> None:
    engine = _Watching()
    engine.state_dir = tmp_path / "state"
    replica = Replica(grown.chain, engine, engine.state_dir, "replica-0")
    replica.refresh(0)
    replica.refresh(1)
    assert len(engine.seen) == len(grown.chain.manifest(1).tensors)
    assert set(engine.seen) == {(None, "moving", 0, 1)}


def test_a_checkpoint_that_does_not_fill_the_model_is_not_served(tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=0)
    state = state_of(build_model("qwen3"))
    state.pop("model.norm.weight")
    grown.grow(state)
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "state", "replica-0")
    with pytest.raises(ApplyError, match=r"does not fill model\.norm\.weight"):
        replica.refresh()
    assert replica.version is None


def test_a_mark_cut_off_by_a_power_cut_is_no_mark(replica: Replica, grown: ModelChain) -> None:
    (replica.state_dir / "replica.json").write_text('{"status": "chec')
    again = Replica(grown.chain, TransformersEngine("cpu"), replica.state_dir, "replica-0")
    assert again.recover() is None
    assert Mark.model_validate_json(_mark_after(again)).version == 2


def _mark_after(replica: Replica) -> bytes:
    replica.refresh()
    return (replica.state_dir / "replica.json").read_bytes()


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
