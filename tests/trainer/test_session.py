"""Publishing from a training loop of one process: what is committed, and what happens when the bucket fails."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tests.chain.counting import CountingStore
from tests.chains import AT_ONCE
from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain
from weightline.chain.read.records import GAPS, read_records
from weightline.chain.replay.plan import Ways, plan_between
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write import version as version_module
from weightline.codec.digest import parse_digest
from weightline.codec.torch_ops import bits_of
from weightline.errors import (
    BaseMismatchError,
    CommitConflictError,
    InputError,
    ObjectExistsError,
    PublishError,
    TransientStorageError,
)
from weightline.format.manifest import FORMAT_1, FORMAT_2
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.store.retry import RetryingStore
from weightline.testing.faults import FaultStore, failing
from weightline.trainer import writer
from weightline.trainer.session import PublishSession
from weightline.trainer.settings import PublishSettings
from weightline.trainer.start import plan_start
from weightline.trainer.steps import load_observer


class Model(torch.nn.Module):
    """Tied, frozen, scalar, empty and integer tensors, and a buffer that belongs to no checkpoint."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(50, 16, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(16, 50, bias=False, dtype=torch.bfloat16)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Parameter(torch.randn(7, dtype=torch.float32), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
        self.empty = torch.nn.Parameter(torch.zeros(0, 3, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def step(self, number: int) -> None:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(number)
            mask = torch.rand(self.embed.weight.shape, generator=generator) < 0.1
            self.embed.weight[mask] *= -1.01
            self.scale += 0.25
            self.count += 1


def _assert_version_is(chain: Chain, version: int, model: Model) -> None:
    state = read_state(Chain(chain.store), version)
    expected = dict(model.named_parameters()) | {"count": model.count}
    assert set(state.bits) == set(expected)
    for name, tensor in expected.items():
        assert state.bits[name].tobytes() == bits_of(tensor.detach().reshape(-1)).tobytes(), name


def _session(chain: Chain, **settings: object) -> PublishSession:
    return PublishSession(chain, PublishSettings(**settings))  # type: ignore[arg-type]


def _train(session: PublishSession, model: Model, num_steps: int) -> None:
    for number in range(1, num_steps + 1):
        model.step(number)
        session.sync(number)
    session.flush()
    session.close()


def test_every_sync_is_a_version_with_the_exact_bits(tmp_path: Path) -> None:
    chain, model = Chain(LocalStore(tmp_path)), Model()
    session = _session(chain, stage="sft")
    session.start(model, None, 0)
    _assert_version_is(chain, 0, model)
    for number in (1, 2, 3):
        model.step(number)
        session.sync(number, metrics={"loss": 0.5})
        session.flush()
        _assert_version_is(chain, number, model)
    session.close()
    assert [m.kind for m in chain.manifests()] == ["anchor", "delta", "delta", "delta"]
    assert chain.manifest(2).metrics == {"loss": 0.5}
    assert chain.manifest(0).is_milestone


@pytest.mark.parametrize("written_as", [FORMAT_1, FORMAT_2])
def test_assets_are_named_again_so_that_no_reader_looks_far_for_them(
    monkeypatch: pytest.MonkeyPatch, written_as: str
) -> None:
    monkeypatch.setattr(version_module, "NEW_CHAINS", written_as)
    monkeypatch.setattr(writer, "ASSETS_EVERY", 3)
    chain, model = Chain(MemoryStore()), Model()
    model.generation_config = GenerationConfig(max_new_tokens=7)
    for num_steps in (4, 3):  # the second session finds the same files in the chain
        session = _session(chain, stage="sft")
        session.start(model, None, 0)
        _train(session, model, num_steps)
    named = [manifest.version for manifest in chain.manifests() if manifest.assets]
    assert named == ([0, 3, 6] if written_as == FORMAT_1 else list(range(8)))
    assert len({manifest.assets for manifest in chain.manifests() if manifest.assets}) == 1
    assert verify_chain(Chain(chain.store)).holds


def test_listeners_learn_of_every_version_once_it_exists(caplog: pytest.LogCaptureFixture) -> None:
    chain, model = Chain(MemoryStore()), Model()
    session, heard = _session(chain), list[tuple[int, str]]()

    def fails(version: int, commit_id: str) -> None:
        raise ZeroDivisionError("of the listener")

    session.on_committed(fails)
    session.on_committed(lambda version, commit_id: heard.append((Chain(chain.store).tip_version(), commit_id)))
    session.start(model, None, 0)
    _train(session, model, 2)
    assert heard == [(manifest.version, manifest.commit_id) for manifest in chain.manifests()]
    assert len(heard) == 3
    assert "telling of version 2 failed: ZeroDivisionError: of the listener" in caplog.text


def test_nan_and_signed_zero_are_bits(tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain)
    session.start(model, None, 0)
    with torch.no_grad():
        model.embed.weight[0] = float("nan")
        model.embed.weight[1] = 0.0
        model.embed.weight[2] = torch.tensor(-0.0)
        model.embed.weight.view(torch.int16)[0, 1] = 0x7FC1
    session.sync(1)
    with torch.no_grad():
        model.embed.weight[1] = torch.tensor(-0.0)
    session.sync(2)
    session.flush()
    _assert_version_is(chain, 2, model)
    assert chain.manifest(2).num_changed == 16


def test_a_second_process_goes_on_from_the_tip(tmp_path: Path) -> None:
    chain, model = Chain(MemoryStore()), Model()
    first = _session(chain, stage="sft")
    first.start(model, None, 0)
    _train(first, model, 2)
    second = _session(chain, stage="dpo")
    assert second.start(model, None, 0).action == "continue"
    _train(second, model, 1)
    assert [m.stage for m in chain.manifests()] == ["sft", "sft", "sft", "dpo"]
    _assert_version_is(chain, 3, model)


def test_other_weights_are_refused_before_training() -> None:
    chain = Chain(MemoryStore())
    _session(chain).start(Model(0), None, 0)
    with pytest.raises(BaseMismatchError, match="name a new chain"):
        _session(chain).start(Model(1), None, 0)
    with pytest.raises(BaseMismatchError, match="another model"):
        _session(chain).start(torch.nn.Linear(2, 2), None, 0)
    assert chain.tip_version() == 0


def test_resume_behind_the_tip_commits_a_revert() -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain)
    session.start(model, None, 0)
    _train(session, model, 1)
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    session = _session(chain)
    session.start(model, None, 1)
    _train(session, model, 2)
    resumed = Model()
    resumed.load_state_dict(checkpoint)
    session = _session(chain)
    plan = session.start(resumed, None, 1)
    assert (plan.action, plan.reverts_to) == ("revert", 1)
    assert (chain.tip().kind, chain.tip().version, chain.tip().reverts_to) == ("revert", 4, 1)
    assert chain.tip().digests == chain.manifest(1).digests
    _assert_version_is(chain, 4, resumed)
    resumed.step(7)
    session.sync(2)
    session.flush()
    _assert_version_is(chain, 5, resumed)


@pytest.mark.parametrize("says", ["truth", "another version", "another chain", "a version that is not there"])
def test_the_mark_of_a_checkpoint_saves_the_search_and_is_not_trusted(says: str) -> None:
    chain, model = Chain(MemoryStore()), Model()
    with _session(chain) as session:
        session.start(model)
        model.step(1)
        session.sync(1)
        session.flush()
        checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for number in range(2, 12):
            model.step(number)
            session.sync(number)
        session.flush()
    truth = VersionMark.of(chain, chain.manifest(1))
    mark = {
        "truth": truth,
        "another version": VersionMark.of(chain, chain.manifest(7)),
        "another chain": replace(truth, commit_id="0" * 32),
        "a version that is not there": replace(truth, version=99),
    }[says]
    resumed = Model()
    resumed.load_state_dict(checkpoint)
    counting = CountingStore(chain.store)
    loaded = {name: parse_digest(digest) for name, digest in chain.manifest(1).digests.items()}
    plan = plan_start(
        Chain(counting), loaded, chain.tip().specs, is_resumed=True, run_id="run", stage="train", mark=mark
    )
    assert (plan.action, plan.reverts_to) == ("revert", 1)
    num_read = counting.num("get", "commits")
    assert num_read == 2 if says == "truth" else num_read > 10
    with _session(chain) as session:
        assert session.start(resumed, None, 1, mark).reverts_to == 1


def test_a_stage_that_died_before_its_first_checkpoint_starts_again_from_its_start() -> None:
    chain, model = Chain(MemoryStore()), Model()
    first = _session(chain, stage="sft", run_id="run-1")
    first.start(model, None, 0)
    _train(first, model, 2)
    for others in ({"stage": "sft", "run_id": "run-2"}, {"stage": "dpo", "run_id": "run-1"}):
        with pytest.raises(BaseMismatchError, match="name a new chain"):
            _session(chain, **others).start(Model(), None, 0)
    again = _session(chain, stage="sft", run_id="run-1")
    plan = again.start(Model(), None, 0)
    assert (plan.action, plan.reverts_to) == ("revert", 0)
    _assert_version_is(chain, 3, Model())


def test_resume_from_a_state_that_was_never_committed_commits_the_way_to_it() -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain)
    session.start(model, None, 0)
    model.step(1)
    session = _session(chain)
    assert session.start(model, None, 5).action == "delta"
    _assert_version_is(chain, 1, model)


def test_resume_from_a_version_that_was_collected_commits_the_way_to_it() -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain)
    session.start(model, None, 0)
    _train(session, model, 4)
    expire_before(chain, 3)
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    assert Chain(chain.store).versions() == (3, 4)
    resumed = Model()
    resumed.step(1)
    assert _session(Chain(chain.store)).start(resumed, None, 1).action == "delta"
    _assert_version_is(chain, 5, resumed)


def test_policy_stop_raises_and_commits_nothing() -> None:
    store = FaultStore(MemoryStore(), lambda *_: None)
    chain, model = Chain(store), Model()
    session = _session(chain)
    session.start(model, None, 0)
    store.plan = failing(verb="put_file", key_prefix="payloads/", times=1)
    model.step(1)
    session.sync(1)
    with pytest.raises(PublishError, match="run again"):
        session.flush()
    assert chain.tip_version() == 0


@pytest.mark.parametrize("coding", ["gap", "gap-by-magnitude"])
def test_every_coding_publishes(coding: str) -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain, coding=coding)
    session.start(model, None, 0)
    _train(session, model, 3)
    assert [m.coding for m in chain.manifests()][1:] == [coding] * 3
    _assert_version_is(chain, 3, model)


@pytest.mark.parametrize(("verb", "prefix", "times"), [("put_file", "payloads/", 1), ("put_if_absent", "commits/", 1)])
def test_policy_skip_lets_the_next_version_span_the_gap(verb: str, prefix: str, times: int) -> None:
    store = FaultStore(MemoryStore(), lambda *_: None)
    chain, model = Chain(store), Model()
    session = _session(chain, on_publish_error="skip_and_record", max_in_flight=3)
    session.start(model, None, 0)
    store.plan = failing(verb=verb, key_prefix=prefix, times=times)
    _train(session, model, 6)
    model.step(7)
    tip = chain.tip_version()
    assert tip is not None
    assert 1 <= tip < 6
    gaps = read_records(chain, GAPS)
    assert [(g["status"], g["global_step"]) for g in gaps] == [("skipped", 1)]
    session = _session(chain)
    with pytest.raises(BaseMismatchError):
        session.start(model, None, 0)


def test_after_a_skip_the_tip_is_the_trained_state() -> None:
    store = FaultStore(MemoryStore(), lambda *_: None)
    chain, model = Chain(store), Model()
    session = _session(chain, on_publish_error="skip_and_record")
    session.start(model, None, 0)
    store.plan = failing(verb="put_file", key_prefix="payloads/", times=1)
    model.step(1)
    session.sync(1)
    session.flush()
    model.step(2)
    session.sync(2)
    session.flush()
    assert chain.tip_version() == 1
    assert chain.tip().global_step == 2
    _assert_version_is(chain, 1, model)


@pytest.mark.parametrize(
    ("run_id", "who"), [("run", "an earlier attempt of this run, or another writer"), ("other", "another writer")]
)
def test_a_foreign_commit_stops_training_whatever_the_policy(run_id: str, who: str) -> None:
    chain, model = Chain(MemoryStore()), Model()
    ours = _session(chain, on_publish_error="skip_and_record")
    ours.start(model, None, 0)
    foreign = _session(Chain(chain.store), run_id=run_id)
    foreign.start(model, None, 0)
    model.step(1)
    foreign.sync(1)
    foreign.flush()
    ours.sync(1)
    with pytest.raises(CommitConflictError, match=f"committed by {who}"):
        ours.flush()
    assert chain.tip_version() == 1


class _LosingStore(MemoryStore):
    """Creates of manifests take effect, and the next `num_lost` replies to them do not come."""

    num_lost = 0

    def put_if_absent(self, key: str, body: bytes) -> None:
        if not self.num_lost or not key.startswith("commits/"):
            return super().put_if_absent(key, body)
        self.num_lost -= 1
        with suppress(ObjectExistsError):
            super().put_if_absent(key, body)
        raise TransientStorageError("no reply", key=key)


def test_a_commit_whose_reply_is_lost_is_asked_for_again() -> None:
    """By the store, as every remote one is opened."""
    store = _LosingStore(f"memory://{uuid.uuid4().hex}")
    chain, model = Chain(RetryingStore(store, pause_seconds=0.01)), Model()
    session = _session(chain, on_publish_error="stop")
    session.start(model, None, 0)
    store.num_lost = 1
    _train(session, model, 2)
    assert chain.tip_version() == 2
    _assert_version_is(chain, 2, model)


@pytest.mark.parametrize("policy", ["stop", "skip_and_record"])
def test_a_commit_whose_reply_never_comes_is_not_built_upon_and_the_next_run_resumes_from_it(policy: str) -> None:
    store = _LosingStore()
    chain, model = Chain(store), Model()
    session = _session(chain, on_publish_error=policy)
    session.start(model, None, 0)
    store.num_lost = 1
    model.step(1)
    session.sync(1)
    if policy == "skip_and_record":
        session.flush()
        session.sync(2)
    expected = CommitConflictError if policy == "skip_and_record" else PublishError
    with pytest.raises(expected, match="an earlier attempt of this run" if policy == "skip_and_record" else "no reply"):
        session.flush()
    again = _session(chain)
    assert again.start(model, None, 1).action == "continue"
    model.step(2)
    again.sync(2)
    again.flush()
    assert chain.tip_version() == 2
    _assert_version_is(chain, 2, model)


def test_fold_spans_syncs_while_the_bucket_is_slow() -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain, on_backlog="fold", max_in_flight=1)
    session.start(model, None, 0)
    captured = []
    for number in range(1, 20):
        model.step(number)
        captured.append(session.sync(number))
    session.sync(20, is_milestone=True)
    session.flush()
    assert chain.tip_version() == sum(captured) + 1
    _assert_version_is(chain, sum(captured) + 1, model)


def test_an_anchor_is_written_when_replaying_costs_more_than_it() -> None:
    chain, model = Chain(MemoryStore()), Model()
    session = _session(chain, anchor_policy=AnchorPolicy(delta_elements_per_second=1e4, anchor_elements_per_second=1e5))
    session.start(model, None, 0)
    states = []
    for number in range(1, 13):
        model.step(number)
        session.sync(number)
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    session.flush()
    session.close()
    anchored = [v for v in range(13) if any(s.base_version is None for s in Ways(chain).shortcuts_into(v))]
    assert 1 <= len(anchored) < 12
    plan = plan_between(chain, None, 12)
    assert plan.hops[0].version == anchored[-1]
    assert verify_chain(Chain(chain.store)).holds
    assert read_state(chain, anchored[0]).bits["count"].tolist() == [anchored[0]] * 3
    _assert_version_is(chain, 12, model)


def test_an_anchor_that_fails_costs_no_version() -> None:
    store = FaultStore(MemoryStore(), lambda *_: None)
    chain, model = Chain(store), Model()
    session = _session(chain, anchor_policy=AnchorPolicy(delta_elements_per_second=1e-3))
    session.start(model, None, 0)
    store.plan = failing(verb="put_if_absent", key_prefix="shortcuts/", times=100)
    _train(session, model, 4)
    assert chain.tip_version() == 4
    assert list(Ways(chain).shortcuts_into(4)) == []
    _assert_version_is(chain, 4, model)


def test_an_unwritable_bucket_is_refused_at_the_start() -> None:
    store = FaultStore(MemoryStore(), failing(verb="put_if_absent", key_prefix="probes/", times=1))
    with pytest.raises(TransientStorageError):
        _session(Chain(store)).start(Model(), None, 0)
    assert list(store.inner.list("")) == []


@pytest.mark.parametrize(
    "settings", [{"sync_steps": 0}, {"max_in_flight": 0}, {"coding": "none"}, {"on_backlog": "drop"}]
)
def test_settings_are_checked_when_made(settings: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PublishSettings(**settings)  # type: ignore[arg-type]


def test_a_step_observer_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.at:all"):
        load_observer("nowhere.at:all")
