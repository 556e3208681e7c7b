"""Signed chains: what a reader who demands signatures believes, and what it refuses before it fetches anything."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.chains import commit_state, later, nudged, random_state
from weightline.chain.read.history import Chain, open_chain
from weightline.chain.replay.plan import plan_between
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.compact import CompactionPlan, write_compaction
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.commit import commit_manifest, sign_existing
from weightline.chain.write.standalone import commit_revert
from weightline.errors import InputError, SignatureError, TransientStorageError
from weightline.format import keys
from weightline.format.signature import (
    SIGNING_KEY_VARIABLE,
    TRUSTED_KEYS_VARIABLE,
    Signature,
    Signer,
    TrustedKeys,
    generate_key,
    load_signer,
    load_trusted_keys,
)
from weightline.store.base import ObjectInfo
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore, failing

STATES = [random_state(0)]
for seed in range(1, 5):
    STATES.append(nudged(STATES[-1], seed))


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "key"
    generate_key(path)
    return path


@pytest.fixture(scope="module")
def trusted(key: Path) -> TrustedKeys:
    return load_trusted_keys(key.with_name("key.pub"))


@pytest.fixture
def signed(key: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """Five signed versions, a signed revert, signed shortcuts."""
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(key))
    chain = Chain(MemoryStore())
    for before, state in zip([None, *STATES], STATES, strict=False):
        commit_state(chain, state, before)
    commit_revert(chain, 1)
    direct = dict.fromkeys(range(5), 0.0)
    write_compaction(chain, CompactionPlan(4, (0,), direct, writes_anchor=True), coding="gap")
    monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    return chain


class _Watched:
    """A store that remembers what was read."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.read: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get(self, key: str, *limit: int) -> bytes:
        self.read.append(key)
        return self._store.get(key, *limit)

    def get_file(self, key: str, path: Path, *nbytes: int) -> None:
        self.read.append(key)
        self._store.get_file(key, path, *nbytes)


def _demanding(chain: Chain, trusted: TrustedKeys) -> tuple[Chain, _Watched]:
    assert isinstance(chain.store, MemoryStore)
    watched = _Watched(chain.store)
    return Chain(watched, trusted), watched  # type: ignore[arg-type]


def test_a_signed_chain_holds_for_who_demands_it_and_for_who_does_not(signed: Chain, trusted: TrustedKeys) -> None:
    demanding, _ = _demanding(signed, trusted)
    for version, state in enumerate(STATES):
        found = read_state(demanding, version)
        for name, bits in state.items():
            np.testing.assert_array_equal(found.bits[name], bits.reshape(-1))
    assert plan_between(demanding, None, 4).hops[0].is_shortcut
    assert verify_chain(Chain(signed.store)).findings == verify_chain(demanding).findings == ()


def _altered(raw: bytes) -> bytes:
    """Well formed, and another run's by its own word."""
    return json.dumps(json.loads(raw) | {"run_id": "mallory"}).encode()


def _unsigned(chain: Chain, version: int) -> None:
    for info in list(chain.store.list(f"{keys.SIGNATURES}{keys.commit(version)}")):
        chain.store.delete(info.key)


def _forged(chain: Chain, version: int, other_key: Path) -> None:
    """Signed by somebody else, who says that he is the trusted one."""
    theirs = load_signer(other_key).sign(keys.commit(version), chain.store.get(keys.commit(version)))
    forged = theirs.model_copy(update={"key_id": _signature_of(chain, version).key_id})
    chain.store.put(forged.key, forged.to_bytes())


@pytest.mark.parametrize("how", ["unsigned", "altered", "forged", "stranger", "moved", "no-signature-at-all"])
def test_what_nobody_vouches_for_is_refused_before_any_fetch(
    how: str, signed: Chain, trusted: TrustedKeys, tmp_path: Path
) -> None:
    commit = keys.commit(3)
    (signature,) = (info.key for info in signed.store.list(f"{keys.SIGNATURES}{commit}"))
    generate_key(tmp_path / "other")
    if how == "unsigned":
        _unsigned(signed, 3)
    elif how == "altered":
        raw = _altered(signed.store.get(commit))
        signed.store.put(commit, raw)
        body = Signature.from_bytes(signed.store.get(signature))
        moved = body.model_copy(update={"sha256": _sha256(raw)})
        signed.store.put(moved.key, moved.to_bytes())
    elif how == "forged":
        _forged(signed, 3, tmp_path / "other")
    elif how == "stranger":
        _unsigned(signed, 3)
        theirs = load_signer(tmp_path / "other").sign(commit, signed.store.get(commit))
        signed.store.put(theirs.key, theirs.to_bytes())
    elif how == "moved":
        # A true signature of the same bytes under another key of the bucket.
        there = _signature_of(signed, 2)
        signed.store.put(commit, signed.store.get(keys.commit(2)))
        signed.store.put(keys.signature(commit, there.sha256, there.key_id), there.to_bytes())
    else:
        signed.store.put(signature, b"{}")
    demanding, watched = _demanding(signed, trusted)
    with pytest.raises(SignatureError):
        read_state(demanding, 3)
    assert not [key for key in watched.read if key.startswith(keys.PAYLOADS)]
    assert "signature" in {finding.rule for finding in verify_chain(demanding).findings}


def _signature_of(chain: Chain, version: int) -> Signature:
    (info,) = chain.store.list(f"{keys.SIGNATURES}{keys.commit(version)}")
    return Signature.from_bytes(chain.store.get(info.key))


def _sha256(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def test_a_shortcut_that_nobody_signed_is_passed_over_and_told(signed: Chain, trusted: TrustedKeys) -> None:
    """The state digest of a shortcut's result is no defence against people: its payloads are believed by signature."""
    for info in list(signed.store.list(f"{keys.SIGNATURES}{keys.SHORTCUTS}")):
        signed.store.delete(info.key)
    demanding, _ = _demanding(signed, trusted)
    assert not any(hop.is_shortcut for hop in plan_between(demanding, None, 4).hops)
    assert any(hop.is_shortcut for hop in plan_between(Chain(signed.store), None, 4).hops)
    told = [finding.subject for finding in verify_chain(demanding).findings if finding.rule == "signature"]
    assert told == [keys.shortcut(0, 4), keys.shortcut(None, 4)]


def test_any_of_several_trusted_keys_will_do(signed: Chain, key: Path, tmp_path: Path) -> None:
    generate_key(tmp_path / "newer")
    both = tmp_path / "both.pub"
    both.write_bytes((tmp_path / "newer.pub").read_bytes() + key.with_name("key.pub").read_bytes())
    demanding, _ = _demanding(signed, load_trusted_keys(both))
    assert verify_chain(demanding).holds
    strangers, _ = _demanding(signed, load_trusted_keys(tmp_path / "newer.pub"))
    with pytest.raises(SignatureError, match="is not signed by a trusted key"):
        strangers.manifest(0)


def test_the_environment_of_a_reader_demands_signatures_of_every_chain(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/chain"
    commit_state(open_chain(url), STATES[0])
    monkeypatch.setenv(TRUSTED_KEYS_VARIABLE, str(key.with_name("key.pub")))
    with pytest.raises(SignatureError):
        open_chain(url).manifest(0)
    monkeypatch.setenv(TRUSTED_KEYS_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no key can be read"):
        open_chain(url)


def test_a_lost_reply_does_not_make_a_signed_commit_another_one(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(key))
    chain = Chain(MemoryStore())
    manifest = commit_state(chain, STATES[0])
    commit_manifest(chain, manifest)
    assert len(list(chain.store.list(keys.SIGNATURES))) == 1


def test_a_signed_commit_is_one_create_only_put_and_its_signature_is_there_before(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Create-only may be slow (a Hub bucket without keys waits for each), and a signature's key names its content."""
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(key))
    done: list[tuple[str, str]] = []
    chain = Chain(FaultStore(MemoryStore(), lambda _, verb, name: done.append((verb, name))))
    manifest = commit_state(chain, STATES[0])
    (signature,) = (info.key for info in chain.store.list(keys.SIGNATURES))
    assert [name for verb, name in done if verb == "put_if_absent"] == [manifest.key]
    assert done.index(("put_file", signature)) < done.index(("put_if_absent", manifest.key))
    done.clear()
    assert sign_existing(chain.store, load_signer(key)) == 0
    assert not {verb for verb, _ in done} & {"put", "put_file", "put_if_absent"}, "what is there stays"


def test_a_crash_between_signature_and_commit_leaves_no_version(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(key))
    store = MemoryStore()
    away = failing(verb="put_if_absent", key_prefix=keys.COMMITS, times=1)
    with pytest.raises(TransientStorageError):
        commit_state(Chain(FaultStore(store, away)), STATES[0])
    assert Chain(store).tip_version() is None
    assert len(list(store.list(keys.SIGNATURES))) == 1
    away = failing(verb="put_file", key_prefix=keys.SIGNATURES, times=1)
    with pytest.raises(TransientStorageError):
        commit_state(Chain(FaultStore(store, away)), STATES[0])
    assert Chain(store).tip_version() is None


def test_an_unsigned_chain_becomes_a_signed_one(key: Path, trusted: TrustedKeys) -> None:
    chain = Chain(MemoryStore())
    commit_state(chain, STATES[0])
    commit_state(chain, STATES[1], STATES[0])
    expire_before(chain, 1)
    demanding, _ = _demanding(chain, trusted)
    assert {finding.rule for finding in verify_chain(demanding).findings} >= {"signature"}
    assert sign_existing(chain.store, load_signer(key)) == 3
    assert sign_existing(chain.store, load_signer(key)) == 0
    demanding, _ = _demanding(chain, trusted)
    assert verify_chain(demanding).holds


def test_a_key_is_checked_before_it_is_used(key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no key can be written"):
        generate_key(key)
    assert key.stat().st_mode & 0o777 == 0o600
    for text, says in (("", "no public key"), ("-----BEGIN PUBLIC KEY-----\n", "not a public key")):
        (tmp_path / "broken.pub").write_text(text)
        with pytest.raises(InputError, match=says):
            load_trusted_keys(tmp_path / "broken.pub")
    copy = tmp_path / "copy"
    copy.write_bytes(key.read_bytes())
    copy.chmod(0o644)
    with pytest.raises(InputError, match="other users can access"):
        load_signer(copy)
    with pytest.raises(InputError, match="holds no private key"):
        load_signer(_private(tmp_path / "text", b"no key"))
    chain = Chain(MemoryStore())
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no key can be read"):
        commit_state(chain, STATES[0])
    assert chain.tip_version() is None


def _private(path: Path, body: bytes) -> Path:
    path.touch(0o600)
    path.write_bytes(body)
    return path


def test_a_signature_is_the_one_of_the_specification() -> None:
    """Fixed for ever: RFC 8032 over the format's name, the key of the object, and its bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    key_id = hashlib.sha256(private.public_key().public_bytes_raw()).hexdigest()[:16]
    made = Signer(key_id, private).sign("commits/00000000000000000000.json", b"{}")
    message = b"weightline-signature/1\ncommits/00000000000000000000.json\n{}"
    private.public_key().verify(bytes.fromhex(made.signature), message)
    assert made.key_id == "56475aa75463474c"
    assert made.signature.startswith("64b3fc2b328cb4faba6701bcafa6f8bb")
    assert made.key == f"signatures/commits/00000000000000000000.json/{hashlib.sha256(b'{}').hexdigest()}-{key_id}.json"


def test_without_cryptography_the_remedy_is_told(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for use in (lambda: load_signer(key), lambda: load_trusted_keys(key), lambda: generate_key(key)):
        with pytest.raises(InputError, match=r"pip install 'weightline\[sign\]'"):
            use()


def test_signatures_go_with_what_they_sign(signed: Chain, trusted: TrustedKeys) -> None:
    orphan = _signature_of(signed, 2).model_copy(update={"sha256": "0" * 64})
    signed.store.put(orphan.key, orphan.to_bytes())
    expire_before(signed, 4)
    plan = plan_gc(view_chain(signed, later(days=2)))
    gone = {keys.subject_of_signature(info.key) for info in plan.signatures}
    assert {keys.commit(v) for v in range(4)} | {keys.shortcut(0, 4)} == gone
    collect(signed, plan)
    demanding, _ = _demanding(signed, trusted)
    assert verify_chain(demanding).holds
    assert read_state(demanding, 5).digests == read_state(Chain(signed.store), 5).digests
    assert _versions_of(signed.store.list(keys.SIGNATURES)) == {keys.commit(4), keys.commit(5), keys.shortcut(None, 4)}


def _versions_of(infos: Iterator[ObjectInfo]) -> set[str]:
    return {keys.subject_of_signature(info.key) for info in infos}
