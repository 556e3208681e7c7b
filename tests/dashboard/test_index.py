"""The index follows a bucket: what is new, what went away, what cannot be read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.chains import commit_state, nudged, random_state
from tests.dashboard.chains import broken_chain, commit_step, record_life, stamp
from weightline.chain import Chain, open_chain
from weightline.chain.read.leases import Lease, write_lease
from weightline.chain.read.refs import move_horizon, move_ref
from weightline.chain.write.standalone import commit_fork, commit_revert
from weightline.dashboard import buckets as buckets_module
from weightline.dashboard import index as index_module
from weightline.dashboard.buckets import chain_id, find_chains
from weightline.dashboard.index import ChainIndex
from weightline.dashboard.pages import card, glance
from weightline.errors import InputError
from weightline.format import keys
from weightline.store.memory import MemoryStore


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def _grow(chain: Chain, number: int) -> None:
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    for seed in range(1, number):
        before, state = state, nudged(state, seed)
        commit_state(chain, state, before)


def _read_all(index: ChainIndex) -> None:
    while index.refresh():
        pass


def test_a_generation_is_new_only_when_something_changed(pool: ThreadPoolExecutor) -> None:
    chain = open_chain("memory://dashboard-generations")
    index = ChainIndex(chain, pool)
    assert index.snapshot.state == "loading"
    _grow(chain, 3)
    _read_all(index)
    first = index.snapshot
    assert (first.state, first.tip, first.num_pending) == ("ready", 2, 0)
    _read_all(index)
    assert index.snapshot is first
    record_life(chain, 1, 0.5, 0.0)
    _read_all(index)
    assert index.snapshot.generation == first.generation + 1
    row = index.snapshot.row(1)
    assert row is not None
    assert (row.score, row.serving) == (0.5, "done")
    assert [replica["name"] for replica in index.snapshot.replicas] == ["replica-0", "replica-1"]


def test_a_long_chain_is_read_newest_first(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "BATCH", 2)
    chain = open_chain("memory://dashboard-batches")
    _grow(chain, 5)
    index = ChainIndex(chain, pool)
    seen = []
    for has_more in (True, True, False):
        assert index.refresh() is has_more
        seen.append([row.version for row in index.snapshot.rows])
    assert seen == [[3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert index.snapshot.versions == (0, 1, 2, 3, 4)


class _CountingStore(MemoryStore):
    num_read = 0

    def get(self, key: str, *limit: int) -> bytes:
        self.num_read += 1
        return super().get(key, *limit)


def test_the_first_look_at_ten_thousand_versions_reads_a_screenful(pool: ThreadPoolExecutor) -> None:
    """What makes the first paint quick, without a clock: benchmarks/dashboard_bench.py measures it with one."""
    store = _CountingStore("memory://dashboard-long")
    chain = Chain(store)
    _grow(chain, 2)
    delta = chain.manifest(1)
    for version in range(2, 10_000):
        later = delta.model_copy(update={"version": version, "base_version": version - 1})
        store.put(keys.commit(version), later.to_bytes())
    store.delete(keys.TIP_HINT)
    store.num_read = 0
    index = ChainIndex(Chain(store), pool)
    assert index.refresh()
    assert store.num_read < 60
    assert (index.snapshot.state, index.snapshot.tip, len(index.snapshot.versions)) == ("ready", 9_999, 10_000)
    assert [row.version for row in index.snapshot.rows][-1] == 9_999
    assert len(glance(index.snapshot, 400)["bins"]) <= 400
    assert len(json.dumps(card("long", "long", chain.url, index.snapshot))) < 20_000


def test_a_broken_manifest_and_a_gap_are_told_and_hide_nothing(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    index = ChainIndex(broken_chain(tmp_path), pool)
    _read_all(index)
    snapshot = index.snapshot
    assert [row.version for row in snapshot.rows] == [0, 1, 3, 5, 6]
    assert list(snapshot.broken) == [2]
    assert snapshot.missing == ((4, 4),)


def test_a_manifest_of_another_version_is_broken(pool: ThreadPoolExecutor) -> None:
    chain = open_chain("memory://dashboard-misplaced")
    _grow(chain, 2)
    chain.store.put(keys.commit(2), chain.store.get(keys.commit(1)))
    index = ChainIndex(chain, pool)
    _read_all(index)
    assert "holds the manifest of version 1" in index.snapshot.broken[2]


def test_expired_versions_are_no_gap(pool: ThreadPoolExecutor) -> None:
    chain = open_chain("memory://dashboard-expired")
    _grow(chain, 5)
    move_horizon(chain, 3)
    for version in (0, 2):
        chain.store.delete(keys.commit(version))
    index = ChainIndex(chain, pool)
    _read_all(index)
    assert index.snapshot.versions == (1, 3, 4)
    assert index.snapshot.missing == ()


def test_versions_that_go_and_names_that_move_are_noticed(pool: ThreadPoolExecutor) -> None:
    chain = open_chain("memory://dashboard-goes")
    _grow(chain, 3)
    index = ChainIndex(chain, pool)
    _read_all(index)
    move_ref(chain, "best", 1)
    move_ref(chain, "best", 2)
    chain.store.delete(keys.commit(0))
    for _ in range(31):
        index.refresh()
    assert index.snapshot.refs == {"best": 2}
    assert index.snapshot.versions == (1, 2)


def test_a_bucket_that_fails_keeps_what_was_read_and_comes_back(pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "bucket").as_uri())
    _grow(chain, 2)
    index = ChainIndex(chain, pool)
    _read_all(index)
    (tmp_path / "bucket").rename(tmp_path / "away")
    (tmp_path / "bucket").write_text("")
    _read_all(index)
    assert (index.snapshot.state, index.snapshot.tip) == ("unreachable", 1)
    assert index.snapshot.problem is not None
    assert "Not a directory" in index.snapshot.problem
    (tmp_path / "bucket").unlink()
    (tmp_path / "away").rename(tmp_path / "bucket")
    _read_all(index)
    assert (index.snapshot.state, index.snapshot.problem, index.snapshot.tip) == ("ready", None, 1)


def test_reverts_and_forks_are_rows(pool: ThreadPoolExecutor) -> None:
    chain, fork = open_chain("memory://dashboard-origin"), open_chain("memory://dashboard-fork")
    _grow(chain, 3)
    commit_revert(chain, 0)
    commit_fork(chain, 1, fork)
    indexes = [ChainIndex(one, pool) for one in (chain, fork)]
    for index in indexes:
        _read_all(index)
    assert indexes[0].snapshot.rows[-1].reverts_to == 0
    origin = indexes[1].snapshot.rows[0].forked_from
    assert origin is not None
    assert (origin.chain, origin.version) == (chain.url, 1)


def _lease(replica: str, expires_at: str, **fields: Any) -> Lease:
    return Lease(
        replica=replica, holder="h", engine="vllm", host="host", pid=1, release="0", state="serving", version=0,
        renewed_at=stamp(0), expires_at=expires_at, ttl_seconds=0.0, **fields,
    )  # fmt: skip


def test_leases_say_which_replicas_are_alive(pool: ThreadPoolExecutor) -> None:
    chain = open_chain("memory://dashboard-leases")
    commit_step(chain, random_state(0), None)
    record_life(chain, 0, 0.5, 0.0)
    index = ChainIndex(chain, pool)
    _read_all(index)
    assert [replica["is_expired"] for replica in index.snapshot.replicas] == [False, False]
    write_lease(chain, _lease("replica-0", stamp(-60)).model_copy(update={"ttl_seconds": 60.0}))
    write_lease(chain, _lease("replica-9", stamp(60)))
    chain.store.put("records/replicas/torn/lease.json", b"{")
    _read_all(index)
    told = {replica["name"]: replica for replica in index.snapshot.replicas}
    assert {name: replica["is_expired"] for name, replica in told.items()} == {
        "replica-0": False, "replica-1": True, "replica-9": True,
    }  # fmt: skip
    assert told["replica-0"]["engine"] == "vllm"
    assert told["replica-0"]["since"] is not None
    generation = index.snapshot.generation
    write_lease(chain, _lease("replica-0", stamp(-90)).model_copy(update={"ttl_seconds": 60.0}))
    _read_all(index)
    assert index.snapshot.generation == generation


def test_chains_below_a_folder_are_found(tmp_path: Path) -> None:
    for run in ("a", "b"):
        _grow(open_chain((tmp_path / run / "bucket" / run).as_uri()), 1)
    (tmp_path / ".stack" / "x" / "commits").mkdir(parents=True)
    found = find_chains([str(tmp_path)]).chains
    assert sorted(chain.name for chain in found) == ["a", "b"]
    assert len({chain_id(chain) for chain in found}) == 2
    assert [chain.url for chain in find_chains([found[0].url, found[0].url]).chains] == [found[0].url]
    assert [chain.name for chain in find_chains([str(tmp_path / "not-yet")]).chains] == ["not-yet"]
    assert find_chains([f"{tmp_path / 'not-yet'}/"]).chains == ()
    with pytest.raises(InputError, match="no store"):
        find_chains(["gopher://hole"])


def test_of_too_many_chains_the_newest_are_shown_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, run in enumerate(("newest", "a", "oldest")):
        _grow(open_chain((tmp_path / run / "bucket" / run).as_uri()), 1)
        os.utime(tmp_path / run / "bucket" / run, (10**9 - age, 10**9 - age))
    assert [chain.name for chain in find_chains([f"{tmp_path}/"]).chains] == ["newest", "a", "oldest"]
    monkeypatch.setattr(buckets_module, "MAX_CHAINS", 2)
    found = find_chains([f"{tmp_path}/", "memory://named"])
    assert ([chain.name for chain in found.chains], found.num_left_out) == (["named", "newest"], 2)


def test_whatever_goes_wrong_is_told_on_the_page_and_passes(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chain = open_chain("memory://dashboard-odd")
    _grow(chain, 1)
    index = ChainIndex(chain, pool)
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "read_leases", lambda _: 1 / 0)
        assert index.refresh() is False
    assert index.snapshot.state == "unreachable"
    assert "ZeroDivisionError" in str(index.snapshot.problem)
    assert "cannot be read" in caplog.text
    _read_all(index)
    assert (index.snapshot.state, index.snapshot.problem) == ("ready", None)
