"""How many requests the verbs of a chain make: none may grow with what it does not need."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chain.counting import CountingStore
from tests.chains import AT_ONCE, commit_state, later, make_manifest, nudged, random_state
from weightline.chain.files.assets import assets_of, upload_files
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, newest_records, read_version_records, write_record
from weightline.chain.read.refs import resolve
from weightline.chain.replay.plan import direct_plan, plan_between
from weightline.chain.replay.state import advance_state, read_state
from weightline.chain.upkeep.compact import AnchorPolicy, CompactionPlan, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, host_clock, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.format import keys
from weightline.format.manifest import FORMAT_1
from weightline.lineage.listing import list_versions
from weightline.store.memory import MemoryStore

NUM_VERSIONS = 40
#: Every direct delta of so small a model is cheaper than two hops, so that each version gets a shortcut to the tip.
SHAPES = {"weight": (64, 8), "bias": (8,)}


def grow(chain: Chain, num_versions: int, folder: Path | None = None, written_as: str | None = None) -> None:
    state = random_state(0, SHAPES)
    assets = upload_files(chain.store, folder) if folder else ()
    commit_state(chain, state, world_size=1, assets=assets, written_as=written_as)
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
        assert store.num("list") <= 16, "one of each kind of objects, and of each kind of records"
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


def test_assets_of_format_1_are_found_once_and_from_there_on(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    store = CountingStore(MemoryStore())
    grow(Chain(store), NUM_VERSIONS, tmp_path, written_as=FORMAT_1)
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


@pytest.fixture
def long_chain(tmp_path: Path) -> CountingStore:
    """60 versions with small files and a provenance; versions 0 and 40 have anchors."""
    (tmp_path / "config.json").write_text("{}")
    store = CountingStore(MemoryStore("memory://requests/long"))
    chain, state = Chain(store), random_state(0, SHAPES)
    links = {"host": "h"}
    commit_state(chain, state, world_size=1, assets=upload_files(store, tmp_path), provenance=links)
    for seed in range(1, 60):
        before, state = state, nudged(state, seed, 0.01)
        commit_state(chain, state, before, world_size=1, provenance=links)
        if seed == 40:
            write_compaction(chain, CompactionPlan(40, (), {}, writes_anchor=True), coding="gap")
    store.reset()
    return store


def _requests(store: CountingStore) -> dict[str, int]:
    """How often each verb was asked for each kind of object."""
    return {f"{verb} {folder}": number for (verb, folder), number in sorted(store.requests.items())}


def test_a_commit_asks_for_its_base_and_puts_three_objects(long_chain: CountingStore) -> None:
    chain = Chain(long_chain)
    state = {name: bits.reshape(SHAPES[name]) for name, bits in read_state(chain, 59).bits.items()}
    for seed in (100, 101):
        before, state = state, nudged(state, seed, 0.01)
        version = chain.tip_version()
        long_chain.reset()
        manifest = make_manifest(state, (version or 0) + 1, new_commit_id(), (), is_anchor=False)
        commit_manifest(chain, manifest.model_copy(update={"provenance": {"host": "h"}}))
        assert before.keys() == state.keys()
    assert _requests(long_chain) == {"head commits": 1, "put hints": 1, "put_if_absent commits": 1}


def test_a_commit_in_format_1_asks_whether_the_chain_was_upgraded() -> None:
    store = CountingStore(MemoryStore())
    chain, state = Chain(store), random_state(0, SHAPES)
    commit_state(chain, state, written_as=FORMAT_1)
    for version in (1, 2):
        chain.tip_version()
        store.reset()
        commit_manifest(chain, make_manifest(state, version, new_commit_id(), (), is_anchor=False))
    assert _requests(store) == {
        "head commits": 1, "head formats": 1, "put hints": 1, "put_if_absent commits": 1,
    }  # fmt: skip


def test_the_tip_takes_two_requests_and_its_header_a_third(long_chain: CountingStore) -> None:
    assert Chain(long_chain).tip_header().version == 59
    assert _requests(long_chain) == {"get commits": 1, "get hints": 1, "list commits": 1}


def test_a_plan_of_one_step_reads_one_header(long_chain: CountingStore) -> None:
    assert direct_plan(Chain(long_chain), 58, 59) is not None
    assert _requests(long_chain) == {"get commits": 1}
    long_chain.reset()
    assert len(plan_between(Chain(long_chain), 58, 59).hops) == 1
    assert sum(_requests(long_chain).values()) <= 6


def test_digests_of_any_version_cost_its_header_and_two_shared_objects(long_chain: CountingStore) -> None:
    chain = Chain(long_chain)
    chain.digests(57)
    assert _requests(long_chain) == {"get commits": 1, "get digests": 1, "get layouts": 1}
    long_chain.reset()
    chain.digests(3)
    assert _requests(long_chain) == {"get commits": 1}
    long_chain.reset()
    assert [asset.name for asset in assets_of(chain, 31)] == ["config.json"]
    assert chain.provenance(chain.header(31)) == {"host": "h"}
    assert _requests(long_chain) == {"get assets": 1, "get commits": 1, "get provenance": 1}


def test_a_pull_near_an_anchor_costs_the_way_from_it(long_chain: CountingStore, tmp_path: Path) -> None:
    write_checkpoint(Chain(long_chain), 43, tmp_path / "pulled")
    found = _requests(long_chain)
    # Versions 43 down to 40, and those beyond the anchor whose deltas take fewer bytes than it does.
    assert found["get commits"] <= 10
    assert found["get_file payloads"] == 4
    assert sum(found.values()) <= 20


def test_a_reader_that_holds_a_state_checks_the_next_one_by_its_root(long_chain: CountingStore) -> None:
    """A list of digests is not read: the root is over all digests, and the reader has them."""
    chain, state = Chain(long_chain), read_state(Chain(long_chain), 58)
    chain.layout(58)
    long_chain.reset()
    advance_state(chain, state, 59)
    assert _requests(long_chain) == {"get commits": 1, "get_file payloads": 1}


def test_log_and_show_read_what_they_print(long_chain: CountingStore) -> None:
    chain = Chain(long_chain)
    versions = chain.newest_versions(20)
    assert versions == tuple(range(59, 39, -1))
    assert chain.num_versions(59) == 60
    list_versions(chain, versions)
    found = _requests(long_chain)
    assert found.pop("get commits") == 20
    assert sum(found.values()) <= 7
    long_chain.reset()
    chain = Chain(long_chain)
    chain.manifest(resolve(chain, "tip"))
    assert sum(_requests(long_chain).values()) == 7
