"""Objects that nobody vouches for: a typed error that names what is wrong, before room is made for what they claim."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chains import AT_ONCE, commit_state, nudged, random_state
from tests.codec.states import whole
from tests.compat.generate import FOLDER
from weightline.chain.read.history import Chain
from weightline.chain.read.records import (
    EVALUATIONS,
    last_recorded,
    newest_records,
    read_record,
    read_records,
    recorded_versions,
    write_record,
)
from weightline.chain.read.refs import current_refs, history_of, move_ref, newest_move, oldest_kept, resolve
from weightline.chain.replay import fetch
from weightline.chain.replay.fetch import fetch_object
from weightline.chain.replay.state import HostState, read_state
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import commit_manifest
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import (
    CorruptError,
    DigestMismatchError,
    InputError,
    ManifestError,
    PayloadError,
    StorageError,
)
from weightline.format import keys
from weightline.format.documents import MAX_MANIFEST_NBYTES, MAX_NOTE_NBYTES, MAX_RECORD_NBYTES
from weightline.format.manifest import FORMAT_1, FORMAT_2, Manifest, PayloadRef, TensorState
from weightline.format.payload import Payload, open_payload
from weightline.format.shortcut import Shortcut
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.lineage.listing import list_versions
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore
from weightline.types import Changes, Segment, TensorSpec

MIB = 1 << 20
REF, RECORD, HORIZON = keys.ref("good", 0), keys.record(EVALUATIONS, 1, "toy"), f"{keys.HISTORY}{keys.padded(0)}.json"


def made(written_as: str) -> Chain:
    chain, state = Chain(MemoryStore("memory://hostile/toy")), random_state(0)
    commit_state(chain, state, written_as=written_as)
    commit_state(chain, nudged(state, 1), state)
    move_ref(chain, "good", 1)
    write_record(chain, EVALUATIONS, 1, "toy", {"status": "done", "score": 0.5})
    return chain


@pytest.fixture
def chain() -> Chain:
    return made(FORMAT_2)


@pytest.fixture
def old_chain() -> Chain:
    return made(FORMAT_1)


def edit(chain: Chain, key: str, **fields: Any) -> None:
    chain.store.put(key, json.dumps(json.loads(chain.store.get(key)) | fields).encode())


READS: dict[str, list[Callable[[Chain], object]]] = {
    REF: [
        current_refs,
        lambda chain: newest_move(chain, "good"),
        lambda chain: history_of(chain, "good"),
        lambda chain: resolve(chain, "good"),
    ],
    RECORD: [
        lambda chain: read_records(chain, EVALUATIONS),
        lambda chain: read_record(chain, EVALUATIONS, 1, "toy"),
    ],
    HORIZON: [oldest_kept],
}

BODIES = [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"1", b"null", b"{}", b'{"a": 1}', b'{"version": 1}']


@pytest.mark.parametrize("body", BODIES)
def test_an_object_that_is_none_is_named(chain: Chain, body: bytes) -> None:
    for key, reads in READS.items():
        chain.store.put(key, body)
        for read in reads:
            with pytest.raises(CorruptError) as caught:
                read(chain)
            assert caught.value.facts["key"] == key
        assert not verify_chain(chain).holds
        chain.store.delete(key)
    assert verify_chain(chain).holds


FIELDS = [
    (REF, {"version": -1}), (REF, {"version": "1"}), (REF, {"version": True}), (REF, {"commit_id": "x"}),
    (REF, {"is_tag": "yes"}), (REF, {"name": "better"}), (REF, {"number": 1}), (REF, {"name": "../x"}),
    (RECORD, {"version": "1"}), (RECORD, {"version": 0}), (RECORD, {"name": "other"}), (RECORD, {"name": 1}),
    (RECORD, {"status": None}),
]  # fmt: skip


@pytest.mark.parametrize(("key", "fields"), FIELDS)
def test_a_field_that_cannot_be_is_refused(chain: Chain, key: str, fields: dict[str, Any]) -> None:
    edit(chain, key, **fields)
    with pytest.raises(CorruptError):
        READS[key][0](chain)


def test_fields_of_later_releases_do_no_harm(chain: Chain) -> None:
    edit(chain, REF, mood="good")
    edit(chain, RECORD, mood="good", kind=None)
    assert resolve(chain, "good") == 1
    assert read_records(chain, EVALUATIONS)[0]["mood"] == "good"


def test_a_hint_of_any_bytes_is_only_a_hint(chain: Chain) -> None:
    for body in BODIES:
        chain.store.put(keys.TIP_HINT, body)
        assert chain.tip_version() == 1


def claim(chain: Chain, *shape: int) -> None:
    """Let version 0 say that a scalar is larger than its payloads."""
    manifest = chain.manifest(0)
    tensors = json.loads(manifest.to_bytes())["tensors"]
    tensors["scale"]["shape"] = shape
    num_elements = manifest.num_elements - 1 + math.prod(shape)
    edit(chain, manifest.key, tensors=tensors, num_elements=num_elements, full_nbytes=2 * num_elements)


@pytest.mark.parametrize(("shape", "error"), [
    ([1 << 45], PayloadError), ([1 << 60], ManifestError), ([1000 << 63], ManifestError), ([1] * 33, ManifestError),
    ([2], PayloadError),
])  # fmt: skip
def test_a_manifest_that_claims_more_than_its_payloads_hold(old_chain: Chain, shape: list[int], error: type) -> None:
    claim(old_chain, *shape)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_state(Chain(old_chain.store), 0)
        assert not verify_chain(Chain(old_chain.store)).holds
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


WEIGHT = TensorSpec("weight", "U8", (6,))


def parts(path: Path, *ranges: tuple[int, int]) -> PayloadInfo:
    segments = [Segment(WEIGHT, start, stop - start) for start, stop in ranges]
    return write_anchor(path, [(segment, np.ones(segment.length, np.uint8)) for segment in segments])


COVERS = [
    ([lambda p: parts(p, (0, 3)), lambda p: parts(p, (3, 6))], None),
    ([lambda p: parts(p, (4, 6), (0, 2)), lambda p: parts(p, (2, 4))], None),
    ([lambda p: parts(p, (0, 5))], "anchor-cover"),
    ([lambda p: parts(p, (1, 6))], "anchor-cover"),
    ([lambda p: parts(p, (0, 2), (3, 6))], "anchor-cover"),
    ([lambda p: parts(p, (0, 6)), lambda p: parts(p, (5, 6))], "anchor-cover"),
    ([lambda p: parts(p, (0, 4)), lambda p: parts(p, (3, 6))], "anchor-cover"),
    ([], "anchor-cover"),
]  # fmt: skip


def commit_anchor(folder: Path, tensor: TensorSpec, digest: str, writers: list[Callable[[Path], PayloadInfo]]) -> Chain:
    """Version 0 of one tensor, with these payloads."""
    chain, refs = Chain(MemoryStore("memory://hostile/cover")), []
    for rank, write in enumerate(writers):
        info = write(folder / "p")
        chain.store.put_file(keys.payload(0, "0" * 32, rank), folder / "p")
        refs.append(PayloadRef(key=keys.payload(0, "0" * 32, rank), nbytes=info.nbytes, sha256=info.sha256, rank=rank))
    tensors = {tensor.name: TensorState(dtype=tensor.dtype, shape=tensor.shape, digest=digest)}
    commit_manifest(chain, Manifest(
        version=0, base_version=None, kind="anchor", commit_id="0" * 32, created_at="", run_id="", stage="",
        global_step=0, coding="ordered-pco", world_size=1, num_changed=0, num_elements=tensor.num_elements,
        full_nbytes=tensor.nbytes, payload_nbytes=sum(ref.nbytes for ref in refs), payloads=tuple(refs),
        tensors=tensors,
    ))  # fmt: skip
    return chain


@pytest.mark.parametrize(("writers", "rule"), COVERS)
def test_an_anchor_holds_every_element_exactly_once(
    tmp_path: Path, writers: list[Callable[[Path], PayloadInfo]], rule: str | None
) -> None:
    digest = format_digest(tensor_digest(Segment(WEIGHT, 0, 6), np.ones(6, np.uint8)))
    chain = commit_anchor(tmp_path, WEIGHT, digest, writers)
    if rule is None:
        assert read_state(chain, 0).bits["weight"].tolist() == [1] * 6
        return
    with pytest.raises(PayloadError) as caught:
        read_state(chain, 0)
    assert caught.value.facts["rule"] == rule


def test_a_delta_of_nothing_makes_no_room(tmp_path: Path) -> None:
    """It covers any number of elements in a few bytes, so it must not stand for an anchor."""
    huge = whole("weight", "U8", 1 << 33)
    nothing = Changes(huge, np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(0, np.uint8))
    chain = commit_anchor(tmp_path, huge.tensor, "0" * 32, [lambda path: write_delta(path, [nothing])])
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match="must be an anchor"):
            read_state(chain, 0)
        assert tracemalloc.get_traced_memory()[1] < 20 * MIB
    finally:
        tracemalloc.stop()


def test_a_state_that_this_host_cannot_hold_is_said_so() -> None:
    with pytest.raises(InputError, match="this host cannot hold"):
        HostState().allocate([TensorSpec("huge", "F64", (1 << 56,))])


_FROZEN = max(path for path in FOLDER.iterdir() if path.is_dir())
_OBJECTS = {str(path.relative_to(_FROZEN)): path.read_bytes() for path in _FROZEN.rglob("*") if path.is_file()}
#: Version 0 is behind the horizon, and so is where one shortcut starts; one move of a ref was followed by another.
_UNSEEN = {
    *(key for key in _OBJECTS if key.startswith(f"{keys.PAYLOADS}{keys.padded(0)}/")),
    *(ref.key for ref in Shortcut.from_bytes(_OBJECTS[keys.shortcut(0, 5)]).payloads),
    keys.ref("best", 0),
    keys.upgrade(2),  # its fields say nothing
}


@pytest.mark.parametrize("spoil", [lambda body: b"{}", lambda body: body[: len(body) // 2]], ids=["empty", "cut off"])
def test_one_bad_object_is_told_and_harms_no_reader(spoil: Callable[[bytes], bytes]) -> None:
    """Every object of a chain in turn. fuzz/chain.py goes on from here."""
    for spoiled in sorted(_OBJECTS):
        store = MemoryStore()
        for key, body in _OBJECTS.items():
            store.put(key, spoil(body) if key == spoiled else body)
        tip = Chain(store).tip_version()
        assert tip == 5
        assert verify_chain(Chain(store)).holds == (spoiled in _UNSEEN)
        try:
            state = read_state(Chain(store), tip)
        except CorruptError:
            continue
        assert state.version == tip


def test_an_object_that_is_no_manifest_is_not_the_tip(chain: Chain) -> None:
    junk = [keys.commit(99), keys.commit(100), keys.commit((1 << 63) - 1), f"{keys.COMMITS}{'9' * 20}.json"]
    for key in junk:
        chain.store.put(key, b"{}")
    chain.store.put(keys.commit(1000), chain.store.get(keys.commit(1)))  # of another version
    for hint in (b'{"version": 1}', b'{"version": 99}', b"{}"):
        chain.store.put(keys.TIP_HINT, hint)
        assert Chain(chain.store).tip_version() == 1
    assert Chain(chain.store).versions() == (0, 1)
    new = nudged(random_state(0), 7)
    assert commit_state(Chain(chain.store), new, nudged(random_state(0), 1)).version == 2
    assert {f.rule for f in verify_chain(Chain(chain.store)).findings} == {"commit-key", "manifest"}
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    assert verify_chain(Chain(chain.store)).holds


def test_a_broken_tip_behind_which_all_is_expired_is_still_the_tip(chain: Chain) -> None:
    """Else a writer would begin the chain anew over what is left of it."""
    expire_before(chain, 1)
    collect(chain, plan_gc(view_chain(chain), grace=AT_ONCE))
    chain.store.put(keys.commit(1), b"{}")
    assert Chain(chain.store).tip_version() == 1
    with pytest.raises(ManifestError):
        Chain(chain.store).tip()


def test_a_hint_that_may_not_be_read_is_passed_over(chain: Chain) -> None:
    def refuse(number: int, verb: str, key: str) -> None:
        if key == keys.TIP_HINT:
            raise StorageError("access denied", key=key)

    assert Chain(FaultStore(chain.store, refuse)).tip_version() == 1


@pytest.mark.parametrize("junk", ["!", "other", "7", "\u00b2", "\u0663", "9" * 20, "9" * 200], ids=ascii)
def test_an_object_under_no_version_s_key_is_no_record(chain: Chain, junk: str) -> None:
    for version in (0, 1):
        write_record(chain, EVALUATIONS, version, "gsm8k", {"status": "done", "score": 0.5})
    chain.store.put(f"{keys.RECORDS}{EVALUATIONS}/{junk}/gsm8k.json", b"{}")
    assert recorded_versions(chain, EVALUATIONS) == {0, 1}
    assert last_recorded(chain, EVALUATIONS, "gsm8k", 9) == 1
    assert [record["version"] for record in newest_records(chain, EVALUATIONS, "gsm8k", 9)] == [1, 0]
    listed, problems = list_versions(chain, (1, 0))
    assert [one.row.score for one in listed] == [0.5, 0.5]
    assert problems == ()


TOO_LARGE = {
    keys.commit(1): MAX_MANIFEST_NBYTES, REF: MAX_NOTE_NBYTES, HORIZON: MAX_NOTE_NBYTES, RECORD: MAX_RECORD_NBYTES,
}  # fmt: skip


@pytest.mark.parametrize("key", TOO_LARGE)
def test_an_object_that_is_too_large_is_not_read(tmp_path: Path, chain: Chain, key: str) -> None:
    store = LocalStore(tmp_path)
    for info in chain.store.list(""):
        store.put(info.key, chain.store.get(info.key))
    (tmp_path / key).parent.mkdir(exist_ok=True)
    with (tmp_path / key).open("wb") as file:
        file.truncate(TOO_LARGE[key] + 1)  # a hole: it takes no room
    reads = READS.get(key, [lambda chain: chain.manifest(1)])
    tracemalloc.start()
    try:
        for read in reads:
            with pytest.raises(CorruptError, match="bytes"):
                read(Chain(store))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_a_payload_of_another_size_is_not_fetched(tmp_path: Path, chain: Chain) -> None:
    store = LocalStore(tmp_path / "bucket")
    for info in chain.store.list(""):
        store.put(info.key, chain.store.get(info.key))
    ref = chain.manifest(0).payloads[0]
    with (tmp_path / "bucket" / ref.key).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DigestMismatchError, match="its manifest says"):
        fetch_object(store, ref, tmp_path / "payload")
    assert not list(tmp_path.glob("*payload*"))


def _spoiled(raw: bytes, old: str, new: str) -> bytes:
    text = raw.decode()
    assert old in text
    return text.replace(old, new, 1).encode()


SURROGATE, ENDLESS = '"\\ud800"', "1" + "0" * 400
MANIFEST_EDITS = [
    ('"stage": "sft"', f'"stage": {SURROGATE}'),
    ('"stage": "sft"', '"stage": "\\udc00\\ud800"'),
    ('"stage": "sft"', f'"stage": "{"x" * 1025}"'),
    ('"run_id": "run-1"', f'"run_id": {SURROGATE}'),
    ('"metrics": {}', f'"metrics": {{{SURROGATE}: 1}}'),
    ('"metrics": {}', f'"metrics": {{"loss": {ENDLESS}}}'),
    ('"provenance": {}', f'"provenance": {{"host": {SURROGATE}}}'),
    ('"provenance": {}', f'"provenance": {{"host": "{"x" * 65537}"}}'),
    ('"scale": {', f'{SURROGATE}: {{'),
    ('"global_step": 0', f'"global_step": {ENDLESS}'),
    ('"global_step": 0', f'"global_step": {1 << 63}'),
    ('"rank": 0', f'"rank": {ENDLESS}'),
    *(
        ('"tensors": {', f'"tensors": {{"z": {{"dtype": "BF16", "shape": {shape}, "digest": "{"0" * 32}"}},')
        for shape in ([0, 1 << 62], [0, 1 << 70], [0, 10**9, 10**9])
    ),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MANIFEST_EDITS)
def test_a_manifest_with_what_nothing_can_hold_is_refused(old_chain: Chain, old: str, new: str) -> None:
    old_chain.store.put(keys.commit(0), _spoiled(old_chain.store.get(keys.commit(0)), old, new))
    with pytest.raises(ManifestError):
        Chain(old_chain.store).manifest(0)
    assert not verify_chain(Chain(old_chain.store)).holds


@pytest.mark.parametrize("fields", ['"score": ' + ENDLESS, '"reason": ' + SURROGATE, '"a": [{"b": ' + SURROGATE + "}]"])
def test_a_record_with_what_nothing_can_hold_is_refused(chain: Chain, fields: str) -> None:
    chain.store.put(RECORD, _spoiled(chain.store.get(RECORD), "{", "{" + fields + ","))
    for read in READS[RECORD]:
        with pytest.raises(CorruptError):
            read(chain)


@pytest.mark.parametrize("record", [{"score": 10**400}, {"reason": "\ud800"}, {"log": "x" * MAX_RECORD_NBYTES}])
def test_a_record_that_no_reader_takes_is_not_written(chain: Chain, record: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        write_record(chain, EVALUATIONS, 0, "toy", {"status": "done"} | record)
    assert read_record(chain, EVALUATIONS, 0, "toy") is None


def test_payloads_with_the_same_bytes_are_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of many empty segments takes seconds to open, and a manifest may name it any number of times."""
    opened: list[Path] = []

    def counted(path: Path) -> Payload:
        opened.append(path)
        return open_payload(path)

    monkeypatch.setattr(fetch, "open_payload", counted)
    chain = commit_anchor(tmp_path, WEIGHT, "0" * 32, [lambda path: parts(path, (0, 3))] * 5)
    with pytest.raises(PayloadError):
        read_state(chain, 0)
    assert len(opened) == 1
