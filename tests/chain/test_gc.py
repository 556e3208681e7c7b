"""What crashed writers leave in a folder, and what gc says of a chain that does not hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from tests.chain.test_leases import make_lease
from tests.chains import AT_ONCE, commit_state, later, nudged, random_state
from weightline.chain.read import leases
from weightline.chain.read.history import Chain
from weightline.chain.read.leases import write_lease
from weightline.chain.read.refs import current_refs, move_horizon, move_ref
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep import gc, retention
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.repair import plan_repair, write_repair
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import ConflictError, CorruptError, InputError, StorageError, VersionNotFoundError
from weightline.format import keys
from weightline.lineage.listing import list_versions
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore


def test_what_killed_writers_staged_is_collected_when_it_is_old(tmp_path: Path) -> None:
    chain = Chain(LocalStore(tmp_path))
    commit_state(chain, random_state(0))
    for name, age_seconds in (("stale", 2 * 86400), ("under-way", 60)):
        path = tmp_path / ".staging" / name
        path.write_bytes(b"half a payload")
        os.utime(path, (time.time() - age_seconds,) * 2)
    plan = plan_gc(view_chain(chain))
    assert [info.key for info in plan.objects] == [".staging/stale"]
    collect(chain, plan)
    assert [path.name for path in (tmp_path / ".staging").iterdir()] == ["under-way"]
    at_once = plan_gc(view_chain(chain), grace=AT_ONCE)
    assert [info.key for info in at_once.staged] == [".staging/under-way"]


def test_nothing_is_collected_where_a_ref_leads_nowhere() -> None:
    chain = Chain(MemoryStore())
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    move_ref(chain, "keep", 1)
    move_horizon(chain, 1)
    chain.store.delete(keys.commit(0))
    with pytest.raises(VersionNotFoundError):
        view_chain(chain)


@pytest.fixture
def chain() -> Chain:
    """Versions 0 to 6."""
    made, state = Chain(MemoryStore()), random_state(0)
    commit_state(made, state)
    for seed in range(6):
        before, state = state, nudged(state, seed)
        commit_state(made, state, before)
    return made


@pytest.mark.parametrize("lost", [range(0), range(7)], ids=["horizon beyond the tip", "no version left"])
def test_a_horizon_of_another_chain_lets_nothing_be_collected(chain: Chain, lost: range) -> None:
    """What is left below history/ when commits/ is emptied by hand, and the chain begun anew."""
    move_horizon(chain, 500)
    chain.store.delete(*(keys.commit(version) for version in lost))
    with pytest.raises(CorruptError, match="horizon"):
        view_chain(chain)
    if not lost:
        with pytest.raises(CorruptError, match="horizon"):
            expire_before(Chain(chain.store), 6)
    assert verify_chain(Chain(chain.store)).findings[0].rule == "horizon"


def test_a_missing_version_lets_nothing_be_collected(chain: Chain) -> None:
    chain.store.delete(keys.commit(3))
    with pytest.raises(CorruptError, match="no version 3"):
        view_chain(chain, later(days=2))


def test_age_is_judged_by_the_store_alone(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit is under way, and the host's clock is 25 hours ahead of the store's."""
    chain.store.put("payloads/00000000000000000007/of-a-commit-under-way", b"payload")
    write_lease(chain, make_lease("r", 1))
    expire_before(chain, 6)

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return super().now(tz) + timedelta(hours=25)

    for module in (gc, retention, leases):
        monkeypatch.setattr(module, "datetime", Ahead)
    plan = plan_gc(view_chain(chain))
    assert plan.objects == ()
    at_once = plan_gc(view_chain(chain), grace=AT_ONCE)
    assert {info.key for info in at_once.manifests} == {keys.commit(version) for version in range(2, 6)}
    assert at_once.leases == ()


@pytest.mark.parametrize("pin", [
    lambda chain: move_ref(chain, "best", 2, is_tag=True),
    lambda chain: write_lease(chain, make_lease("r", None, moving_to=2)),
], ids=["tag", "lease"])  # fmt: skip
def test_what_is_named_after_gc_looked_is_kept(chain: Chain, pin: Callable[[Chain], object]) -> None:
    expire_before(chain, 4)
    state = read_state(chain, 2).digests
    plan = plan_gc(view_chain(chain), grace=AT_ONCE)
    assert {info.key for info in plan.manifests} == {keys.commit(version) for version in range(4)}
    pin(chain)
    collect(chain, plan)
    assert Chain(chain.store).versions() == (0, 1, 2, 4, 5, 6)
    assert read_state(Chain(chain.store), 2).digests == state
    assert verify_chain(Chain(chain.store)).holds


def test_what_is_named_between_two_batches_is_kept_or_said_to_be_gone(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "_BATCH_SIZE", 1)
    expire_before(chain, 4)
    plan = plan_gc(view_chain(chain), grace=AT_ONCE)
    doomed: list[str] = []

    class Tagged(FaultStore):
        """A tag comes when the first manifest is deleted: it is the base of the version that the tag names."""

        def delete(self, *keys_: str) -> None:
            super().delete(*keys_)
            doomed.extend(key for key in keys_ if key.startswith((keys.COMMITS, keys.PAYLOADS)))
            if doomed == [keys.commit(0)]:
                move_ref(Chain(self.inner), "best", 2)

    with pytest.raises(VersionNotFoundError, match="weightline repair"):
        collect(Chain(Tagged(chain.store, lambda *_: None)), plan)
    assert doomed == [keys.commit(0)], "nothing is deleted any more"


def test_a_tag_on_a_version_that_is_gone_can_be_moved_and_removed(chain: Chain) -> None:
    for name in ("moved", "removed"):
        move_ref(chain, name, 2, is_tag=True)
    chain.store.delete(*(keys.commit(version) for version in range(4)))
    move_horizon(chain, 4)
    assert move_ref(Chain(chain.store), "moved", 5, is_tag=True).number == 1
    with pytest.raises(InputError, match="never moves"):
        move_ref(Chain(chain.store), "moved", 6)
    repair = plan_repair(verify_chain(Chain(chain.store)).findings)
    assert [finding.key for finding in repair.removed] == [keys.ref("removed", 0)]
    write_repair(chain, repair)
    assert [(ref.name, ref.version) for ref in current_refs(chain).values()] == [("moved", 5)]


def test_a_ref_that_is_moved_again_is_not_removed(chain: Chain) -> None:
    move_ref(chain, "best", 2)
    manifest = chain.store.get(keys.commit(2))
    chain.store.delete(keys.commit(2))
    repair = plan_repair(verify_chain(Chain(chain.store)).findings)
    chain.store.put(keys.commit(2), manifest)
    move_ref(chain, "best", 5)
    write_repair(chain, repair)
    assert {name: ref.version for name, ref in current_refs(chain).items()} == {"best": 5}


def test_a_version_collected_while_it_is_named_is_said_so(chain: Chain) -> None:
    class Collected(FaultStore):
        def put_if_absent(self, key: str, body: bytes) -> None:
            super().put_if_absent(key, body)
            self.inner.delete(keys.commit(2))

    with pytest.raises(ConflictError, match="was collected"):
        move_ref(Chain(Collected(chain.store, lambda *_: None)), "best", 2)


@pytest.mark.parametrize("read", [
    lambda chain: [m.version for m in chain.manifests()],
    lambda chain: [m.version for m in chain.newest_first()][::-1],
    lambda chain: [one.manifest.version for one in list_versions(chain, chain.versions())[0]],
], ids=["manifests", "newest first", "log"])  # fmt: skip
def test_what_is_collected_after_it_was_listed_is_left_out(
    chain: Chain, read: Callable[[Chain], Sequence[int]]
) -> None:
    expire_before(chain, 4)

    def plan(number: int, verb: str, key: str) -> None:
        if verb == "get" and key.startswith(keys.COMMITS):
            collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))

    assert read(Chain(FaultStore(chain.store, plan))) == [4, 5, 6]

    def losing(number: int, verb: str, key: str) -> None:
        if (verb, key) == ("get", keys.commit(5)):
            chain.store.delete(key)

    with pytest.raises(VersionNotFoundError, match="no version 5"):
        read(Chain(FaultStore(chain.store, losing)))


def test_links_are_not_followed_out_of_a_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    made = Chain(LocalStore(tmp_path / "bucket"))
    commit_state(made, random_state(0))
    folder = tmp_path / "bucket" / "payloads"
    for name, target in (("old", outside), ("up", tmp_path / "bucket"), ("again", folder), ("loop", folder / "loop")):
        (folder / name).symlink_to(target)
    (folder / "file").symlink_to(outside / "thesis.txt")
    collect(made, plan_gc(view_chain(made, later(days=2))))
    assert (outside / "thesis.txt").read_text() == "mine"
    assert not (folder / "file").is_symlink(), "a link to a file is an object, and goes as one"
    assert verify_chain(Chain(made.store)).holds
    with pytest.raises(StorageError, match="symbolic link"):
        made.store.delete("payloads/old/thesis.txt")
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"):
        view_chain(made)
