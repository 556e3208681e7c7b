"""verify: one thing broken, one rule that says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.chains import commit_state, copy_of, later, nudged, random_state, restate
from weightline.chain.files.assets import upload_files
from weightline.chain.files.source import VersionSource
from weightline.chain.read.history import Chain
from weightline.chain.read.records import EVALUATIONS, write_record
from weightline.chain.read.refs import move_horizon, move_ref
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import AnchorPolicy, plan_compaction, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.draft import Authorship
from weightline.chain.write.standalone import commit_revert, commit_source
from weightline.errors import CorruptError, DigestMismatchError, NotFoundError
from weightline.format import keys
from weightline.format.header import HeaderV2
from weightline.format.manifest import FORMAT_1, FORMAT_2
from weightline.store.memory import MemoryStore

_TIP = 8
LINKS = {"host": "h"}
_BASE = {"name_or_path": "base", "digest": "0" * 64, "num_elements": 1}


@pytest.fixture(scope="module", params=[FORMAT_1, FORMAT_2])
def grown(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    """In each format: versions 0 to 8, the last a revert to 2.

    All before 6 are collected, but for 0, 1 and 2, which a tag keeps.
    """
    folder: Path = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    store = MemoryStore("memory://verified")
    chain, state = Chain(store), random_state(0)
    commit_state(chain, state, assets=upload_files(store, folder), written_as=request.param, provenance=LINKS)
    for seed in range(1, 8):
        before, state = state, nudged(state, seed)
        commit_state(chain, state, before, coding="gap-by-magnitude", provenance=LINKS)
    commit_revert(chain, 2)
    move_ref(chain, "keep", 2, is_tag=True)
    write_record(chain, EVALUATIONS, 7, "arithmetic", {"status": "done"})
    expire_before(chain, 6)
    few_anchors = AnchorPolicy(anchor_elements_per_second=1e-9)
    write_compaction(chain, plan_compaction(chain, coding="gap", policy=few_anchors), coding="gap")
    collect(chain, plan_gc(view_chain(chain, later(days=2))))
    assert chain.versions() == (0, 1, 2, 6, 7, 8)
    return store


@pytest.fixture
def chain(grown: MemoryStore) -> Chain:
    return Chain(copy_of(grown))


def edit(chain: Chain, key: str, **fields: Any) -> None:
    document = json.loads(chain.store.get(key))
    document.update(fields)
    chain.store.put(key, json.dumps(document).encode())


def flip(chain: Chain, key: str) -> None:
    body = bytearray(chain.store.get(key))
    body[-4] ^= 1
    chain.store.put(key, bytes(body))


def payload_key(chain: Chain, version: int) -> str:
    return Chain(chain.store).manifest(version).payloads[0].key


def anchor_key(version: int) -> str:
    return keys.shortcut(None, version)


def _lose(key_of: Callable[[Chain], str]) -> Callable[[Chain], None]:
    return lambda chain: chain.store.delete(key_of(chain))


def _name_payload_twice(chain: Chain) -> None:
    manifest = chain.manifest(7)
    if manifest.format == FORMAT_2:
        pytest.skip("in format 2 no two payloads have one key")
    first = json.loads(manifest.payloads[0].model_dump_json())
    edit(chain, manifest.key, payloads=[first, first], payload_nbytes=2 * manifest.payloads[0].nbytes)


def _two_bases(chain: Chain) -> None:
    edit(chain, keys.commit(7), base_model=_BASE)
    edit(chain, keys.commit(8), base_model=_BASE | {"digest": "1" * 64})


def _foreign_ref(chain: Chain) -> None:
    edit(chain, keys.ref("keep", 0), commit_id="0" * 32)


def _revert_elsewhere(chain: Chain) -> None:
    edit(chain, keys.commit(8), reverts_to=7)


def _cut(chain: Chain) -> None:
    key = payload_key(chain, 7)
    chain.store.put(key, chain.store.get(key)[:-1])


def _change_asset(chain: Chain) -> None:
    asset = chain.manifest(0).assets[0]
    chain.store.put(asset.key, b"x" * asset.nbytes)


def _shortcut(chain: Chain) -> str:
    return next(i.key for i in chain.store.list(keys.SHORTCUTS) if i.key != anchor_key(6))


TAMPERED: dict[str, tuple[str, Callable[[Chain], None]]] = {
    "a stray key": ("commit-key", lambda c: c.store.put("commits/notes.json", b"{}")),
    "no json": ("manifest", lambda c: c.store.put(keys.commit(7), b"{")),
    "a later feature": ("manifest", lambda c: edit(c, keys.commit(7), features=["later"])),
    "another version's manifest": ("manifest", lambda c: c.store.put(keys.commit(9), c.store.get(keys.commit(8)))),
    "a missing version": ("contiguous", lambda c: c.store.delete(keys.commit(7))),
    "one commit id twice": ("commit-id", lambda c: edit(c, keys.commit(7), commit_id=c.manifest(8).commit_id)),
    "two base models": ("base-model", _two_bases),
    "a revert to another state": ("revert", _revert_elsewhere),
    "a payload named twice": ("payload-keys", _name_payload_twice),
    "a lost payload": ("object-missing", _lose(lambda c: payload_key(c, 7))),
    "a lost payload on a tag's way": ("object-missing", _lose(lambda c: payload_key(c, 1))),
    "a shortcut's lost payload": (
        "object-missing",
        _lose(lambda c: json.loads(c.store.get(anchor_key(6)))["payloads"][0]["key"]),
    ),
    "a lost asset": ("object-missing", _lose(lambda c: c.manifest(0).assets[0].key)),
    "a payload cut off": ("object-size", _cut),
    "an anchor lost on a tag's way": ("unreachable", lambda c: c.store.delete(keys.commit(0))),
    "an anchor lost at the horizon": ("unreachable", lambda c: c.store.delete(anchor_key(6))),
    "a horizon beyond the tip": ("horizon", lambda c: move_horizon(c, 99)),
    "a shortcut that is none": ("shortcut", lambda c: c.store.put(anchor_key(6), b"{}")),
    "a shortcut of other ends": ("shortcut", lambda c: edit(c, anchor_key(6), version=7)),
    "a shortcut to a foreign commit": ("shortcut-commit", lambda c: edit(c, _shortcut(c), commit_id="0" * 32)),
    "a shortcut from a foreign commit": ("shortcut-commit", lambda c: edit(c, _shortcut(c), base_commit_id="0" * 32)),
    "a ref to nowhere": ("ref", lambda c: edit(c, keys.ref("keep", 0), version=99)),
    "a ref to a foreign commit": ("ref", _foreign_ref),
    "a record of nothing": (
        "record",
        lambda c: write_record(c, EVALUATIONS, 99, "arithmetic", {"status": "done"}) and None,
    ),
    "a ref that is none": ("ref", lambda c: c.store.put(keys.ref("x", 0), b'{"a": 1}')),
    "a horizon that is none": ("horizon", lambda c: c.store.put(f"{keys.HISTORY}{keys.padded(1)}.json", b"[]")),
    "a record that is none": ("record", lambda c: c.store.put(keys.record(EVALUATIONS, 7, "x"), b"{}")),
    "another asset of the same size": ("asset", _change_asset),
    "a flipped bit": ("replay", lambda c: flip(c, payload_key(c, 7))),
    "a flipped bit behind the horizon": ("replay", lambda c: flip(c, payload_key(c, 2))),
    "a flipped bit in a shortcut": (
        "replay",
        lambda c: flip(c, json.loads(c.store.get(_shortcut(c)))["payloads"][0]["key"]),
    ),
    "another digest": ("replay", lambda c: restate(c, 7, {"scale": 0})),
    "another number of changes": ("payload-facts", lambda c: edit(c, keys.commit(7), num_changed=3)),
    "another coding": ("payload-facts", lambda c: edit(c, keys.commit(7), coding="gap")),
    "a shortcut's other coding": ("payload-facts", lambda c: edit(c, _shortcut(c), coding="gap-by-magnitude")),
    "a shortcut's other number of changes": ("payload-facts", lambda c: edit(c, anchor_key(6), num_changed=3)),
}


#: What only a header of format 2 names.
SHARED: dict[str, tuple[str, Callable[[Chain], None]]] = {
    "a root that does not fit": ("contents", lambda c: edit(c, keys.commit(7), root="0" * 64)),
    "another list of digests": ("contents", lambda c: _other_bytes(c, keys.DIGESTS)),
    "another layout": ("contents", lambda c: _other_bytes(c, keys.LAYOUTS)),
    "another provenance": ("contents", lambda c: _other_bytes(c, keys.PROVENANCE)),
    "a lost list of digests": ("object-missing", _lose(lambda c: _first(c, keys.DIGESTS))),
    "a lost layout": ("object-missing", _lose(lambda c: _first(c, keys.LAYOUTS))),
    "a lost list of assets": ("object-missing", _lose(lambda c: _list_of_assets(c))),
    "a list of assets cut off": ("object-size", lambda c: c.store.put(_list_of_assets(c), b"[]")),
    "a layout cut off": ("object-size", lambda c: c.store.put(_first(c, keys.LAYOUTS), b"")),
}


def _first(chain: Chain, prefix: str) -> str:
    return next(chain.store.list(prefix)).key


def _other_bytes(chain: Chain, prefix: str) -> None:
    key = _first(chain, prefix)
    chain.store.put(key, b"x" * len(chain.store.get(key)))


def _list_of_assets(chain: Chain) -> str:
    header = chain.header(7)
    assert isinstance(header, HeaderV2)
    assert header.assets is not None
    return keys.asset(header.assets.sha256)


@pytest.mark.parametrize("name", SHARED)
def test_what_is_broken_of_shared_objects_is_found_by_its_rule(chain: Chain, name: str) -> None:
    if not isinstance(chain.header(7), HeaderV2):
        pytest.skip("a manifest of format 1 names none")
    rule, tamper = SHARED[name]
    tamper(chain)
    findings = verify_chain(Chain(chain.store)).findings
    assert rule in {finding.rule for finding in findings}, findings


def test_an_untouched_chain_holds(chain: Chain) -> None:
    report = verify_chain(chain)
    assert report.findings == ()
    assert report.num_versions == 6
    assert report.num_shortcuts > 1


@pytest.mark.parametrize("name", TAMPERED)
def test_what_is_broken_is_found_by_its_rule(chain: Chain, name: str) -> None:
    rule, tamper = TAMPERED[name]
    tamper(chain)
    findings = verify_chain(Chain(chain.store)).findings
    assert rule in {finding.rule for finding in findings}, findings


@pytest.mark.parametrize("name", ["a lost payload on a tag's way", "a flipped bit behind the horizon"])
def test_what_verify_finds_no_reader_gets(chain: Chain, name: str) -> None:
    TAMPERED[name][1](chain)
    with pytest.raises((CorruptError, NotFoundError)):
        read_state(Chain(chain.store), 2)


def test_one_broken_version_hides_no_other_line(chain: Chain) -> None:
    """The line to the tag and the line from the horizon are replayed apart; each is told once, where it breaks."""
    flip(chain, payload_key(chain, 1))
    flip(chain, payload_key(chain, 7))
    subjects = [finding.subject for finding in verify_chain(Chain(chain.store), group_nbytes=64).findings]
    assert subjects == ["version 1 from version 0", "version 7 from version 6"]


def test_quick_reads_no_payload(chain: Chain) -> None:
    flip(chain, payload_key(chain, 7))
    assert verify_chain(chain, is_deep=False).holds


def test_what_this_host_has_cached_hides_nothing(
    grown: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE", str(tmp_path))
    remote = MemoryStore("s3://of-this-test/chain")
    for info in grown.list(""):
        remote.put(info.key, grown.get(info.key))
    chain = Chain(remote)
    read_state(chain, 2)
    flip(chain, payload_key(chain, 2))
    assert read_state(chain, 2).version == 2
    assert [finding.rule for finding in verify_chain(chain).findings] == ["replay"]


def test_a_bearer_of_assets_needs_no_way_to_it(chain: Chain, tmp_path: Path) -> None:
    """A version that stays for its assets alone is not replayed: what leads to it may be collected."""
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    state = random_state(9)
    made = Chain(MemoryStore())
    commit_state(made, state, written_as=FORMAT_1)
    for seed in range(3):
        before, state = state, nudged(state, seed)
        commit_state(made, state, before, assets=upload_files(made.store, tmp_path) if seed == 0 else ())
    expire_before(made, 3)
    collect(made, plan_gc(view_chain(made, later(days=2))))
    assert made.versions() == (1, 3)
    assert verify_chain(Chain(made.store)).findings == ()


@pytest.mark.parametrize("end", ["commit_id", "base_commit_id"])
def test_a_reader_ignores_a_shortcut_of_foreign_commits(chain: Chain, end: str) -> None:
    """SPEC "Shortcuts"."""
    base = keys.ends_of_shortcut(_shortcut(chain))
    assert base is not None
    assert any(hop.is_shortcut for hop in plan_between(chain, *base).hops)
    edit(chain, _shortcut(chain), **{end: "0" * 32})
    assert not any(hop.is_shortcut for hop in plan_between(Chain(chain.store), *base).hops)


def test_a_revert_that_leads_elsewhere_is_not_committed(chain: Chain) -> None:
    """Whatever goes wrong between reading and writing: here, the bits of another version are read."""
    author = Authorship(
        stage="sft", run_id="r", global_step=0, kind="revert", coding="gap", reverts_to=6, is_milestone=True
    )
    with fetching(chain.store) as fetcher:
        with pytest.raises(DigestMismatchError, match="would differ from that of version 6"):
            commit_source(chain, VersionSource(chain, 7, fetcher), author)
    assert chain.tip_version() == _TIP
