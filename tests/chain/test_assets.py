"""Small files beside weights: which are taken, and that gc leaves them to a commit under way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.chains import commit_state, nudged, random_state
from tests.store.racers import write_checkpoint_folder
from weightline.chain.files.assets import assets_of, upload_files
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder, commit_fork, commit_revert
from weightline.errors import InputError
from weightline.format import keys
from weightline.format.manifest import FORMAT_1
from weightline.store import ObjectInfo
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore


class AgedStore(MemoryStore):
    """All that was there at the last `age` is two days old."""

    def age(self) -> None:
        old = datetime.now(UTC) - timedelta(days=2)
        self._objects = {key: (body, old) for key, (body, _) in self._objects.items()}


def _collect(store: MemoryStore) -> tuple[ObjectInfo, ...]:
    """What the scheduled gc does, with its default grace."""
    plan = plan_gc(view_chain(Chain(store)))
    collect(Chain(store), plan)
    return plan.objects


def _collecting_before_commit(store: MemoryStore) -> Chain:
    """A gc runs just before the manifest is put."""

    def plan(number: int, verb: str, key: str) -> None:
        if verb == "put_if_absent" and key.startswith(keys.COMMITS):
            _collect(store)

    return Chain(FaultStore(store, plan))


@pytest.fixture
def store() -> AgedStore:
    return AgedStore("memory://small-files")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint_folder(tmp_path / "checkpoint", 0)


def test_gc_leaves_what_a_crashed_attempt_put_to_the_next_attempt(store: AgedStore, folder: Path) -> None:
    upload_files(store, folder)
    store.age()
    commit_folder(_collecting_before_commit(store), folder)
    assert verify_chain(Chain(store)).findings == ()


def test_gc_leaves_what_was_put_again_after_it_looked(store: AgedStore, folder: Path) -> None:
    (asset,) = upload_files(store, folder)
    store.age()
    plan = plan_gc(view_chain(Chain(store)))
    assert [info.key for info in plan.assets] == [asset.key]
    upload_files(store, folder)
    collect(Chain(store), plan)
    assert store.head(asset.key) is not None


def test_what_the_tip_names_is_not_put_again(store: AgedStore, folder: Path) -> None:
    puts: list[str] = []
    chain = Chain(FaultStore(store, lambda number, verb, key: puts.append(key) if verb == "put_file" else None))
    commit_folder(chain, folder)
    store.age()
    commit_folder(chain, folder)
    commit_revert(chain, 0)
    assert [key.partition("/")[0] for key in puts] == ["assets", "payloads", "layouts", "digests", "assets"]
    assert verify_chain(Chain(store)).findings == ()


def test_gc_leaves_the_files_of_an_expired_version_to_a_revert(store: AgedStore, folder: Path) -> None:
    commit_folder(Chain(store), folder)
    (folder / "config.json").write_text('{"model_type": "other"}')
    commit_folder(Chain(store), folder)
    expire_before(Chain(store), 1)
    store.age()
    commit_revert(_collecting_before_commit(store), 0)
    assert verify_chain(Chain(store)).findings == ()
    assert Chain(store).tip().assets != Chain(store).manifest(1).assets


@pytest.mark.parametrize("read", [
    lambda chain, out: assets_of(chain, 5),
    lambda chain, out: write_checkpoint(chain, 5, out),
    lambda chain, out: commit_revert(chain, 5),
], ids=["search", "pull", "revert"])  # fmt: skip
def test_the_search_for_files_goes_through_what_gc_is_deleting(
    store: AgedStore, folder: Path, tmp_path: Path, read: Callable[[Chain, Path], object]
) -> None:
    """Versions 1 to 3 are collected after they were listed. In format 1 version 0 stays, since it names the files."""
    state = random_state(0)
    commit_state(Chain(store), state, assets=upload_files(store, folder), written_as=FORMAT_1)
    for seed in range(6):
        before, state = state, nudged(state, seed)
        commit_state(Chain(store), state, before)
    expire_before(Chain(store), 4)
    store.age()
    collected: list[str] = []

    def plan(number: int, verb: str, key: str) -> None:
        if not collected and (verb, key) == ("get", keys.commit(3)):
            collected.extend(info.key for info in _collect(store))

    read(Chain(FaultStore(store, plan)), tmp_path / "pulled")
    assert {keys.commit(version) for version in (1, 2, 3)} <= set(collected)
    chain = Chain(store)
    assert assets_of(chain, 5) == assets_of(chain, chain.tip().version) == chain.manifest(0).assets
    assert verify_chain(chain).findings == ()


def test_a_fork_carries_every_file(store: AgedStore, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    commit_folder(Chain(store), folder)
    forked = Chain(MemoryStore("memory://forked"))
    assert commit_fork(Chain(store), 0, forked).assets == Chain(store).manifest(0).assets
    assert verify_chain(forked).findings == ()


def test_names_that_no_manifest_may_have_are_left_out_and_told(
    store: AgedStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("my: notes.txt", "_x.json", "model.fp16.safetensors.index.json", "weightline.json", "optimizer.pt"):
        (folder / name).write_text("{}")
    with caplog.at_level(logging.WARNING):
        manifest = commit_folder(Chain(store), folder)
    assert [asset.name for asset in manifest.assets] == ["_x.json", "config.json"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: left out of the version: my: notes.txt (a name that no version can have), "
        "optimizer.pt (of a training)"
    ]


def test_a_file_is_no_checkpoint_folder(store: AgedStore, folder: Path) -> None:
    with pytest.raises(InputError, match="name a checkpoint folder"):
        commit_folder(Chain(store), folder / "model.safetensors")
    assert list(store.list("")) == []
