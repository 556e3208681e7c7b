"""Manifests and shortcuts as hostile or future writers may make them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chains import make_manifest, random_state
from weightline.errors import InputError, ManifestError, UnsupportedFeatureError
from weightline.format import keys
from weightline.format.manifest import Manifest, PayloadRef
from weightline.format.shortcut import Shortcut

_REF = PayloadRef(key="payloads/x", nbytes=3, sha256="0" * 64, rank=0)
_MANIFEST = make_manifest(random_state(0), 1, "a" * 32, (_REF,), is_anchor=False)
_SHORTCUT = Shortcut(
    version=5, base_version=2, commit_id="a" * 32, base_commit_id="b" * 32, created_at="now", coding="gap",
    num_changed=1, payload_nbytes=3, payloads=(_REF,),
)  # fmt: skip


def _changed(path: str, value: Any) -> bytes:
    document = json.loads(_MANIFEST.to_bytes())
    *parents, last = path.split("/")
    at = document
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at[part]
    at[last] = value
    return json.dumps(document).encode()


def test_round_trip_is_deterministic() -> None:
    assert Manifest.from_bytes(_MANIFEST.to_bytes()) == _MANIFEST
    assert Manifest.from_bytes(_MANIFEST.to_bytes()).to_bytes() == _MANIFEST.to_bytes()
    assert Shortcut.from_bytes(_SHORTCUT.to_bytes()) == _SHORTCUT


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("version", -1, "version"),
        ("version", "1", "version"),
        ("version", 1.0, "version"),
        ("version", True, "version"),
        ("base_version", None, "manifest"),
        ("base_version", 1, "manifest"),
        ("kind", "patch", "kind"),
        ("kind", "revert", "manifest"),
        ("reverts_to", 1, "manifest"),
        ("commit_id", "A" * 32, "commit_id"),
        ("num_changed", 10**12, "manifest"),
        ("num_elements", 1, "manifest"),
        ("full_nbytes", 1, "manifest"),
        ("payload_nbytes", 4, "manifest"),
        ("payloads/0/key", "../../etc/passwd", "payloads.0.key"),
        ("payloads/0/key", "/etc/passwd", "payloads.0.key"),
        ("payloads/0/key", "a\\b", "payloads.0.key"),
        ("payloads/0/sha256", "0" * 63, "payloads.0.sha256"),
        ("payloads/0/nbytes", -3, "payloads.0.nbytes"),
        ("tensors/scale/dtype", "F7", "tensors.scale.dtype"),
        ("tensors/scale/shape", [-1], "tensors.scale.shape.0"),
        ("tensors/scale/digest", "x", "tensors.scale.digest"),
        ("surprise", 1, "surprise"),
    ],
)
def test_a_broken_rule_is_named(path: str, value: Any, rule: str) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.from_bytes(_changed(path, value))
    assert caught.value.facts["rule"] == rule


@pytest.mark.parametrize("raw", [b"", b"nonsense", b"[]", b"\xff\xfe", b"{}", b'{"format": 7}', b"[" * 100_000])
def test_bytes_that_are_no_manifest(raw: bytes) -> None:
    for parse in (Manifest.from_bytes, Shortcut.from_bytes):
        with pytest.raises(ManifestError):
            parse(raw)


def test_a_newer_writer_is_told_from_a_broken_one() -> None:
    for path, value in (("format", "weightline/2"), ("features", ["delta-of-deltas"])):
        with pytest.raises(UnsupportedFeatureError, match="upgrade"):
            Manifest.from_bytes(_changed(path, value))


@pytest.mark.parametrize(
    "change",
    [{"base_version": 5}, {"base_version": 9}, {"base_version": None}, {"base_commit_id": None}, {"payload_nbytes": 2}],
)
def test_a_shortcut_leads_forward(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        Shortcut.from_bytes(json.dumps(json.loads(_SHORTCUT.to_bytes()) | change).encode())


def test_keys_sort_as_versions_do() -> None:
    versions = [0, 9, 10, 99, 100, keys.MAX_VERSION]
    assert sorted(keys.commit(v) for v in versions) == [keys.commit(v) for v in versions]
    assert [keys.version_of_commit(keys.commit(v)) for v in versions] == versions
    assert [keys.version_of_commit(k) for k in ("commits/1.json", "commits/x.json", keys.COMMITS)] == [None] * 3
    assert keys.version_of_commit(keys.commit(keys.MAX_VERSION + 1)) is None
    assert keys.ends_of_shortcut(keys.shortcut(3, 12)) == (3, 12)
    assert keys.ends_of_shortcut(keys.shortcut(None, 12)) == (None, 12)
    assert keys.ends_of_shortcut(keys.commit(1)) is None


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "x" * 129])
def test_names_in_keys_are_plain(name: str) -> None:
    with pytest.raises(InputError):
        keys.ref(name, 0)
