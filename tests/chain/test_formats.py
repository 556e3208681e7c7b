"""Chains in format 1, in format 2 and in both: what writers continue, what readers share, what they refuse."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.chain.counting import CountingStore
from tests.chains import AT_ONCE, State, commit_state, make_manifest, nudged, random_state, restate
from weightline.chain.files.assets import assets_of, upload_files
from weightline.chain.read.contents import BoundedCache
from weightline.chain.read.history import Chain
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import commit_manifest, commit_version, new_commit_id
from weightline.chain.write.standalone import commit_fork, commit_revert
from weightline.chain.write.version import MAX_INLINE_CHANGES, NewVersion, mark_upgraded
from weightline.errors import CorruptError, DigestMismatchError, ManifestError, NotFoundError, UnsupportedFeatureError
from weightline.format import keys
from weightline.format.header import MAX_METRICS, HeaderV2, ref_to
from weightline.format.manifest import FORMAT_1, FORMAT_2, HeaderV1, Manifest
from weightline.format.state_digests import pack_list
from weightline.store.memory import MemoryStore

#: More tensors than a header holds changes of.
MANY = {f"layers.{number}.weight": (2,) for number in range(MAX_INLINE_CHANGES + 40)}


@pytest.fixture
def chain() -> Chain:
    return Chain(MemoryStore("memory://formats/toy"))


def grow(chain: Chain, *formats: str | None, shapes: Mapping[str, tuple[int, ...]] | None = None) -> list[State]:
    """One version for each format (None: as the chain goes on)."""
    states: list[State] = []
    for written_as in formats:
        old = states[-1] if states else None
        states.append(random_state(0, shapes) if old is None else nudged(old, len(states)))
        commit_state(chain, states[-1], old, written_as=written_as)
    return states


def formats(chain: Chain) -> list[str]:
    return [header.format for header in Chain(chain.store).headers()]


def touched(state: State, *names: str) -> State:
    return {name: bits ^ np.uint16(1) if name in names else bits for name, bits in state.items()}


def header_of(chain: Chain, version: int) -> HeaderV2:
    header = Chain(chain.store).header(version)
    assert isinstance(header, HeaderV2)
    return header


def assert_holds(chain: Chain, states: list[State]) -> None:
    fresh = Chain(chain.store)
    assert verify_chain(fresh).findings == ()
    for version, state in enumerate(states):
        found = read_state(Chain(chain.store), version)
        assert all(np.array_equal(found.bits[name], bits.reshape(-1)) for name, bits in state.items())
        assert found.digests == fresh.digests(version)
        assert fresh.manifest(version).digests == fresh.digests(version).formatted()


def test_a_new_chain_is_in_format_2_and_an_old_one_goes_on_in_its_own(chain: Chain) -> None:
    grow(chain, None, None)
    assert formats(chain) == [FORMAT_2] * 2
    old = Chain(MemoryStore())
    states = grow(old, FORMAT_1, None, None)
    commit_revert(old, 0)
    assert formats(old) == [FORMAT_1] * 4
    assert_holds(old, [*states, states[0]])
    forked = Chain(MemoryStore("memory://formats/fork"))
    commit_fork(old, 1, forked)
    assert formats(forked) == [FORMAT_2]
    assert_holds(forked, [states[1]])


def test_an_upgraded_chain_goes_on_in_format_2(chain: Chain) -> None:
    states = grow(chain, FORMAT_1, None)
    assert mark_upgraded(chain)
    assert not mark_upgraded(chain)
    assert formats(chain) == [FORMAT_1] * 2
    for seed in (7, 8):
        states.append(nudged(states[-1], seed))
        commit_state(Chain(chain.store), states[-1], states[-2])
    assert formats(chain) == [FORMAT_1] * 2 + [FORMAT_2] * 2
    assert not mark_upgraded(Chain(chain.store))
    commit_revert(chain, 1)
    assert_holds(chain, [*states, states[1]])
    assert header_of(chain, 4).root == root_by_hand(chain, 1, header_of(chain, 4).layout.sha256)


def root_by_hand(chain: Chain, version: int, layout_sha256: str) -> str:
    return Chain(chain.store).digests(version).root(layout_sha256)


@pytest.mark.parametrize("mix", [
    (FORMAT_2, FORMAT_1, FORMAT_2, FORMAT_1, FORMAT_1, FORMAT_2),
    (FORMAT_1, FORMAT_2, FORMAT_1, FORMAT_2, FORMAT_2, FORMAT_1),
])  # fmt: skip
def test_readers_take_any_mix(chain: Chain, tmp_path: Path, mix: tuple[str, ...]) -> None:
    (tmp_path / "config.json").write_text("{}")
    state = random_state(0)
    commit_state(chain, state, assets=upload_files(chain.store, tmp_path), written_as=mix[0])
    states = [state]
    for written_as in mix[1:]:
        states.append(nudged(states[-1], len(states)))
        commit_state(Chain(chain.store), states[-1], states[-2], written_as=written_as)
    assert formats(chain) == list(mix)
    assert_holds(chain, states)
    assert {assets_of(Chain(chain.store), version) for version in range(6)} == {assets_of(chain, 0)}
    expire_before(chain, 3)
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    assert verify_chain(Chain(chain.store)).findings == ()
    assert {assets_of(Chain(chain.store), version) for version in (3, 4, 5)} == {assets_of(chain, 3)}
    assert [asset.name for asset in assets_of(chain, 5)] == ["config.json"]


def test_an_older_release_is_asked_to_upgrade(chain: Chain) -> None:
    grow(chain, None)
    with pytest.raises(UnsupportedFeatureError, match="upgrade weightline"):
        Manifest.from_bytes(chain.store.get(keys.commit(0)))


def test_what_versions_share_is_put_once(chain: Chain) -> None:
    counting = CountingStore(chain.store)
    writer = Chain(counting)
    state = random_state(0)
    commit_state(writer, state, provenance={"host": "h"})
    assert {key.partition("/")[0] for verb, key in counting.keys if verb == "put_file"} == {
        "payloads", "layouts", "digests", "provenance",
    }  # fmt: skip
    counting.reset()
    commit_state(writer, nudged(state, 1), state, provenance={"host": "h"})
    assert counting.num("put_file") == counting.num("put_file", "payloads")
    first, second = header_of(chain, 0), header_of(chain, 1)
    assert (first.layout, first.provenance) == (second.layout, second.provenance)
    assert first.digests.sha256 == second.digests.sha256
    assert first.digests.changes == ""
    assert Chain(chain.store).manifest(1).provenance == {"host": "h"}


def test_changes_stand_in_the_header_until_there_are_too_many(chain: Chain) -> None:
    """Changes are those since the list, so that no reader walks back further than to it."""
    states = [random_state(0, MANY)]
    commit_state(chain, states[0])
    names = list(MANY)
    for start in range(0, len(names), 24):
        states.append(touched(states[-1], *names[start : start + 24]))
        commit_state(chain, states[-1], states[-2])
    headers = [header_of(chain, version) for version in range(len(states))]
    lists = [header.digests.sha256 for header in headers]
    assert lists == [lists[0]] * 6 + [lists[6]] * 2
    assert lists[6] == ref_to(pack_list(chain.digests(6).digests_T)).sha256
    assert headers[6].digests.changes == "", "24 more would be more than 128"
    assert len(headers[5].to_bytes()) < 4096 + 40 * 24
    assert_holds(chain, states)


def test_a_version_in_which_all_changed_has_a_list_of_its_own_and_a_revert_shares_it(chain: Chain) -> None:
    state = random_state(0, MANY)
    commit_state(chain, state)
    commit_state(chain, touched(state, *MANY), state)
    commit_revert(chain, 0)
    headers = [header_of(chain, version) for version in range(3)]
    assert [header.digests.changes for header in headers] == ["", "", ""]
    assert headers[0].digests == headers[2].digests != headers[1].digests
    assert headers[0].root == headers[2].root
    assert len(list(chain.store.list(keys.DIGESTS))) == 2


def test_many_numbers_leave_room_for_fewer_changes(chain: Chain) -> None:
    """The header stays below 4 kB and 40 bytes for each tensor that the version changed."""
    state = random_state(0, MANY)
    commit_state(chain, state)
    metrics = {f"rewards/some_function/{number:02d}/mean": 0.123456789 for number in range(60)}
    for number, name in enumerate(MANY):
        before, state = state, touched(state, name)
        manifest = make_manifest(state, number + 1, new_commit_id(), (), is_anchor=False)
        commit_manifest(chain, manifest.model_copy(update={"metrics": metrics}))
        if number == 40:
            break
    sizes = [len(chain.store.get(keys.commit(version))) for version in range(1, number + 2)]
    assert max(sizes) <= 4096 + 40
    assert len({header_of(chain, version).digests.sha256 for version in range(number + 2)}) > 1
    assert before is not state


def test_numbers_beyond_what_a_header_holds_are_left_out_and_logged(
    chain: Chain, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_manifest(random_state(0), 0, new_commit_id(), (), is_anchor=True)
    metrics = {str(number): 1.0 for number in range(MAX_METRICS + 3)}
    commit_manifest(chain, manifest.model_copy(update={"metrics": metrics}))
    assert len(header_of(chain, 0).metrics) == MAX_METRICS
    assert [record.getMessage() for record in caplog.records] == [
        f"version 0 has {MAX_METRICS + 3} metrics, and a header holds {MAX_METRICS}: {MAX_METRICS} and those after it "
        "are left out"
    ]


def test_another_layout_of_the_same_tensors_is_the_same_model(chain: Chain) -> None:
    """Two encodings of a layout have two keys and two roots; the states are equal."""
    states = grow(chain, None, None)
    layout = chain.layout(1)
    squeeze = zlib.compressobj(0, zlib.DEFLATED, -15)
    raw = squeeze.compress(zlib.decompress(layout.packed, -15)) + squeeze.flush()
    ref = ref_to(raw)
    chain.store.put(keys.layout(ref.sha256), raw)
    document = json.loads(chain.store.get(keys.commit(1)))
    document["layout"] |= {"sha256": ref.sha256, "nbytes": ref.nbytes}
    document["root"] = root_by_hand(chain, 1, ref.sha256)
    chain.store.put(keys.commit(1), json.dumps(document).encode())
    assert_holds(chain, states)
    commit_state(Chain(chain.store), states[1], states[1])
    assert header_of(chain, 2).layout.sha256 == ref.sha256


TAMPERED: list[tuple[str, type[Exception], Callable[[Chain], object]]] = [
    ("digests-root", ManifestError, lambda c: edit(c, root="0" * 64)),
    ("a change beyond the layout", ManifestError, lambda c: edit(c, digests={"changes": "/wAAAAAAAAAAAAAAAAAAAAAA"})),
    ("another number of tensors", ManifestError, lambda c: edit(c, layout={"num_tensors": 5})),
    ("another size of the layout", CorruptError, lambda c: edit(c, layout={"nbytes": 1})),
    ("elements that do not add up", ManifestError, lambda c: edit(c, num_elements=10**6)),
    ("bytes that do not add up", ManifestError, lambda c: edit(c, full_nbytes=3)),
    ("a list of another length", CorruptError, lambda c: c.store.put(first(c, keys.DIGESTS), bytes(16))),
    ("a longer list", CorruptError, lambda c: c.store.put(first(c, keys.DIGESTS), bytes(16 * 99))),
    ("another list", DigestMismatchError, lambda c: c.store.put(first(c, keys.DIGESTS), bytes(16 * 4))),
    ("no list", NotFoundError, lambda c: c.store.delete(first(c, keys.DIGESTS))),
    ("another layout", DigestMismatchError, lambda c: spoil(c, first(c, keys.LAYOUTS))),
    ("no layout", NotFoundError, lambda c: c.store.delete(first(c, keys.LAYOUTS))),
]


def edit(chain: Chain, **fields: object) -> None:
    document = json.loads(chain.store.get(keys.commit(1)))
    for name, value in fields.items():
        document[name] = document[name] | value if isinstance(value, dict) else value
    chain.store.put(keys.commit(1), json.dumps(document).encode())


def first(chain: Chain, prefix: str) -> str:
    return next(chain.store.list(prefix)).key


def spoil(chain: Chain, key: str) -> None:
    raw = bytearray(chain.store.get(key))
    raw[-1] ^= 1
    chain.store.put(key, bytes(raw))


@pytest.mark.parametrize(("name", "error", "tamper"), TAMPERED, ids=[name for name, *_ in TAMPERED])
def test_what_does_not_fit_the_header_is_refused(
    chain: Chain, name: str, error: type[Exception], tamper: Callable[[Chain], object]
) -> None:
    grow(chain, None, None)
    tamper(chain)
    with pytest.raises(error):
        Chain(chain.store).digests(1)
    assert not verify_chain(Chain(chain.store)).holds


def test_a_state_that_is_not_the_header_s_is_refused_though_all_else_agrees(chain: Chain) -> None:
    grow(chain, None, None)
    restate(chain, 1, {"scale": 5})
    assert Chain(chain.store).digests(1)["scale"] == 5
    with pytest.raises(DigestMismatchError, match="tensor scale"):
        read_state(Chain(chain.store), 1)
    with pytest.raises(DigestMismatchError, match="tensor scale"):
        read_state(Chain(chain.store), 1, {"scale"}.__contains__)
    assert read_state(Chain(chain.store), 1, {"model.norm.weight"}.__contains__).version == 1


def test_a_lost_reply_of_a_header_is_recognized(chain: Chain) -> None:
    grow(chain, None, None)
    before = chain.store.get(keys.commit(1))
    again = commit_version(Chain(chain.store), NewVersion.of(chain.manifest(1)))
    assert again == chain.header(1)
    assert chain.store.get(keys.commit(1)) == before


def test_gc_removes_what_no_kept_header_names(chain: Chain) -> None:
    state = random_state(0, MANY)
    commit_state(chain, state, provenance={"run": "0"})
    for version in range(1, 4):
        before, state = state, touched(state, *MANY)
        commit_state(chain, state, before, provenance={"run": str(version)})
    chain.store.put(keys.layout("0" * 64), b"of a crashed commit")
    expire_before(chain, 3)
    plan = plan_gc(view_chain(chain), grace=AT_ONCE)
    # Versions 1 and 3 have one state, and so one list.
    assert [info.key.partition("/")[0] for info in plan.shared] == ["layouts", "digests"] + ["provenance"] * 3
    collect(chain, plan)
    assert verify_chain(Chain(chain.store)).findings == ()
    assert [len(list(chain.store.list(prefix))) for prefix in keys.SHARED] == [0, 1, 1, 1]


def test_what_was_put_again_after_gc_looked_is_kept(chain: Chain) -> None:
    state = random_state(0, MANY)
    commit_state(chain, state)
    commit_state(chain, touched(state, *MANY), state)
    expire_before(chain, 1)
    plan = plan_gc(view_chain(chain), grace=AT_ONCE)
    (doomed,) = plan.shared
    chain.store._objects[doomed.key] = (chain.store.get(doomed.key), doomed.modified_at.replace(year=2100))  # type: ignore[attr-defined]
    collect(chain, plan)
    assert chain.store.head(doomed.key) is not None


def test_a_cache_is_bounded_by_bytes() -> None:
    cache = BoundedCache(100)
    for number in range(10):
        cache.put(number, str(number), 30)
    assert cache.nbytes <= 100
    assert [cache.get(number) for number in (0, 9)] == [None, "9"]
    cache.put("large", "one", 1000)
    assert cache.get("large") == "one"


def test_headers_of_both_formats_have_the_same_facts(chain: Chain) -> None:
    old, new = Chain(MemoryStore()), chain
    state = random_state(0)
    for one, written_as in ((old, FORMAT_1), (new, FORMAT_2)):
        commit_state(one, state, run_id="r", stage="dpo", is_milestone=True, written_as=written_as)
    mine, theirs = old.header(0), new.header(0)
    assert isinstance(mine, HeaderV1)
    for name in ("version", "kind", "stage", "run_id", "is_milestone", "num_elements", "full_nbytes", "payload_nbytes"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert old.layout(0) == new.layout(0)
    assert old.digests(0) == new.digests(0)
