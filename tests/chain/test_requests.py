"""How many requests the verbs of a chain make: none may grow with what it does not need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chain.counting import CountingStore
from tests.chains import AT_ONCE, commit_state, later, nudged, random_state
from weightline.chain.files.assets import assets_of, upload_files
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, newest_records, read_version_records, write_record
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, host_clock, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.format import keys
from weightline.store.memory import MemoryStore

NUM_VERSIONS = 40
#: Every direct delta of so small a model is cheaper than two hops, so that each version gets a shortcut to the tip.
SHAPES = {"weight": (64, 8), "bias": (8,)}


def grow(chain: Chain, num_versions: int, folder: Path | None = None) -> None:
    state = random_state(0, SHAPES)
    commit_state(chain, state, world_size=1, assets=upload_files(chain.store, folder) if folder else ())
    for seed in range(1, num_versions):
        before, state = state, nudged(state, seed, 0.01)
        commit_state(chain, state, before, world_size=1)


@pytest.fixture
def store() -> CountingStore:
    """40 versions, three horizons, many shortcuts to the tip."""
    counting = CountingStore(MemoryStore())
    chain = Chain(counting)
    grow(chain, NUM_VERSIONS)
    policy = AnchorPolicy(delta_elements_per_second=1e-9)
    write_compaction(chain, plan_compaction(chain, coding="gap", policy=policy), coding="gap")
    for version in (2, 4, 6):
        expire_before(chain, version)
    counting.reset()
    return counting


def test_verify_reads_each_object_once(store: CountingStore) -> None:
    for is_deep in (False, True):
        store.reset()
        assert verify_chain(Chain(store), is_deep=is_deep).holds
        reads = {key: n for (verb, key), n in store.keys.items() if verb in ("get", "get_file")}
        assert max(reads.values()) == 1
        assert store.num("list", "history") <= 3
        assert store.num("list") <= 13, "one of each kind of objects, and of each kind of records"
        assert store.num("head", "payloads") == 0


def test_the_last_step_of_a_reader_reads_none_of_the_shortcuts(store: CountingStore) -> None:
    tip = NUM_VERSIONS - 1
    num_shortcuts = sum(1 for _ in store.list(keys.SHORTCUTS))
    assert num_shortcuts > 10
    store.reset()
    plan = plan_between(Chain(store), tip - 1, tip)
    assert [(hop.start, hop.target) for hop in plan.hops] == [(tip - 1, tip)]
    assert store.num("get", "shortcuts") <= 2, "one from there, and one that is an anchor"
    assert store.num("get", "commits") <= 2


def test_a_late_joiner_reads_nothing_twice(store: CountingStore) -> None:
    plan = plan_between(Chain(store), None, NUM_VERSIONS - 1)
    assert plan.hops[0].base_version is None
    num_shortcuts = sum(1 for _ in store.list(keys.SHORTCUTS))
    assert store.num("get", "shortcuts") <= num_shortcuts
    assert max(n for (verb, _), n in store.keys.items() if verb == "get") == 1


def test_what_is_shown_of_a_version_are_its_own_records(store: CountingStore) -> None:
    chain = Chain(store)
    for version in range(NUM_VERSIONS):
        write_record(chain, EVALUATIONS, version, "toy", {"status": "done", "score": 0.5})
        for replica in ("a", "b"):
            write_record(chain, REFRESHES, version, replica, {"status": "done"})
    store.reset()
    assert [r["name"] for r in read_version_records(chain, REFRESHES, 7)] == ["a", "b"]
    assert [r["version"] for r in read_version_records(chain, EVALUATIONS, 7)] == [7]
    assert store.num("get") == 3
    store.reset()
    assert next(newest_records(chain, EVALUATIONS, "toy", 20))["version"] == 20
    assert store.num("get") == 1


def test_assets_are_found_once_and_from_there_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    store = CountingStore(MemoryStore())
    grow(Chain(store), NUM_VERSIONS, tmp_path)
    chain = Chain(store)
    store.reset()
    (asset,) = assets_of(chain, NUM_VERSIONS - 2)
    assert asset.name == "config.json"
    assert (store.num("list"), store.num("get")) == (1, NUM_VERSIONS - 1)
    store.reset()
    assert assets_of(chain, NUM_VERSIONS - 1) == assets_of(chain, NUM_VERSIONS - 1) == (asset,)
    assert store.num("get") == 1, "a replica that goes on by one reads one manifest"


def test_garbage_goes_in_batches_after_one_more_look(store: CountingStore) -> None:
    chain = Chain(store)
    expire_before(chain, NUM_VERSIONS - 1)
    plan = plan_gc(view_chain(chain, later(days=2)))
    assert len(plan.objects) > 2 * NUM_VERSIONS
    calls: list[int] = []
    inner_delete = store.inner.delete

    def delete(*doomed: str) -> None:
        calls.append(len(doomed))
        inner_delete(*doomed)

    store.delete = delete  # type: ignore[method-assign]
    collect(chain, plan)
    assert sum(calls) == len(plan.objects)
    assert len(calls) <= len([group for group in plan.groups if group])
    assert verify_chain(Chain(store)).holds
    assert plan_gc(view_chain(Chain(store)), grace=AT_ONCE).objects == ()


def test_a_plan_that_is_only_shown_writes_nothing(store: CountingStore) -> None:
    expire_before(Chain(store), NUM_VERSIONS - 1)
    store.reset()
    shown = plan_gc(view_chain(Chain(store), host_clock), grace=AT_ONCE)
    writes = ("put", "put_if_absent", "put_file", "delete")
    assert sum(store.num(verb) for verb in writes) == 0
    assert shown.objects == plan_gc(view_chain(Chain(store)), grace=AT_ONCE).objects
    assert list(store.list(keys.PROBES)) == []


def test_a_horizon_is_read_once(store: CountingStore) -> None:
    chain = Chain(store)
    read_state(chain, NUM_VERSIONS - 1)
    read_state(chain, NUM_VERSIONS - 2)
    assert store.num("get", "history") == 3
