"""The conformance cases: expected bytes, bits, digests, or what a payload, manifest or shortcut breaks.

The coded table inside a payload depends on the zlib build (SPEC.md section Payload), so writers are held to the chunks
and to what the table says; readers are held to the bytes as they stand.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.cases import bits_of, load, segment_of
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.codec.digest import format_digest, tensor_digest
from weightline.errors import CorruptError, UnsupportedFeatureError
from weightline.format.envelope import read_envelope
from weightline.format.header import parse_header
from weightline.format.manifest import Manifest
from weightline.format.payload import open_payload
from weightline.format.shortcut import Shortcut
from weightline.format.state_digests import apply_changes, pack_list, root_of, unpack_list
from weightline.format.tensor_layout import unpack_layout
from weightline.format.write_payload import write_anchor, write_delta
from weightline.types import BitsArray, Segment

TOPICS = ("deltas", "anchors", "digests", "refused", "objects", "layouts", "states")
DELTAS, ANCHORS, DIGESTS, REFUSED, OBJECTS, LAYOUTS, STATES = (load(topic) for topic in TOPICS)


def name_of(case: dict[str, Any]) -> str:
    return " ".join(str(case[key]) for key in ("coding", "object", "case", "name") if key in case)


def contents(path: Path) -> tuple[bytes, bytes, dict[str, str]]:
    """(chunks, inflated table, metadata) of a payload."""
    raw = path.read_bytes()
    with path.open("rb") as file:
        envelope = read_envelope(file, len(raw))
    table = zlib.decompress(raw[envelope.table_start :], -15)
    return raw[envelope.chunks_start : envelope.table_start], table, dict(envelope.metadata)


def test_the_corpus_is_not_empty() -> None:
    assert {case["coding"] for case in DELTAS} == set(codings())
    assert len(DELTAS) >= 50
    assert len(ANCHORS) >= 25
    assert len(DIGESTS) >= 25
    assert len(REFUSED) >= 30
    assert {(case["object"], "error" in case) for case in OBJECTS} == {
        (kind, is_refused) for kind in ("manifest", "shortcut", "header") for is_refused in (True, False)
    }
    assert len(OBJECTS) >= 110
    assert len(LAYOUTS) >= 15
    assert len(STATES) >= 10


@pytest.mark.parametrize("case", DELTAS, ids=name_of)
def test_deltas(tmp_path: Path, case: dict[str, Any]) -> None:
    (tmp_path / "given").write_bytes(bytes.fromhex(case["payload"]))
    segments = {segment_of(entry): entry for entry in case["segments"]}
    read = open_payload(tmp_path / "given").read_changes(None, lambda segment: bits_of(segments[segment], "old"))
    for changes, (segment, entry) in zip(read, segments.items(), strict=True):
        assert changes.segment == segment
        state_N = bits_of(entry, "old").copy()
        state_N[changes.positions_K] = changes.new_K
        assert state_N.tobytes().hex() == entry["new"]
    captured = [capture(s, bits_of(e, "old"), bits_of(e, "new"), ranked=True) for s, e in segments.items()]
    write_delta(tmp_path / "written", captured, case["coding"])
    assert contents(tmp_path / "written") == contents(tmp_path / "given")


@pytest.mark.parametrize("case", ANCHORS, ids=name_of)
def test_anchors(tmp_path: Path, case: dict[str, Any]) -> None:
    (tmp_path / "given").write_bytes(bytes.fromhex(case["payload"]))
    states = [(segment_of(entry), bits_of(entry, "bits")) for entry in case["segments"]]
    for (segment, bits_N), (read_segment, read_N) in zip(
        states, open_payload(tmp_path / "given").read_anchor(None), strict=True
    ):
        assert read_segment == segment
        assert np.array_equal(read_N, bits_N)
    write_anchor(tmp_path / "written", states)
    assert contents(tmp_path / "written") == contents(tmp_path / "given")


@pytest.mark.parametrize("case", DIGESTS, ids=name_of)
def test_digests(case: dict[str, Any]) -> None:
    assert format_digest(tensor_digest(segment_of(case), bits_of(case, "bits"))) == case["digest"]


@pytest.mark.parametrize("case", REFUSED, ids=name_of)
def test_refused(tmp_path: Path, case: dict[str, Any]) -> None:
    (tmp_path / "given").write_bytes(bytes.fromhex(case["payload"]))
    with pytest.raises((CorruptError, UnsupportedFeatureError)) as caught:
        list(open_payload(tmp_path / "given").read_changes(None, _zeros))
    assert caught.value.kind == case["error"]
    assert caught.value.facts.get("rule") == case.get("rule")


@pytest.mark.parametrize("case", OBJECTS, ids=name_of)
def test_manifests_and_shortcuts(case: dict[str, Any]) -> None:
    parse = {"manifest": Manifest.from_bytes, "shortcut": Shortcut.from_bytes, "header": parse_header}[case["object"]]
    raw = case["text"].encode()
    if "error" in case:
        with pytest.raises((CorruptError, UnsupportedFeatureError)) as caught:
            parse(raw)
        assert caught.value.kind == case["error"]
        return
    found = parse(raw)
    assert json.loads(found.to_bytes()) == json.loads(raw)


@pytest.mark.parametrize("case", LAYOUTS, ids=name_of)
def test_layouts(case: dict[str, Any]) -> None:
    raw = bytes.fromhex(case["layout"])
    if "error" in case:
        with pytest.raises(CorruptError) as caught:
            unpack_layout(raw, case["num_tensors"])
        assert (caught.value.kind, caught.value.facts.get("rule")) == (case["error"], case["rule"])
        return
    found = unpack_layout(raw, case["num_tensors"])
    assert [spec.name for spec in found.specs] == case["names"]
    assert zlib.decompress(found.packed, -15) == zlib.decompress(raw, -15)


@pytest.mark.parametrize("case", STATES, ids=name_of)
def test_states(case: dict[str, Any]) -> None:
    if "root" in case:
        listed_T = unpack_list(bytes.fromhex("".join(case["digests"])), len(case["digests"]))
        assert root_of(case["layout_sha256"], listed_T) == case["root"]
        return
    listed_T = unpack_list(b"".join(number.to_bytes(16, "big") for number in (1, 2, 3)), 3)
    if "error" in case:
        with pytest.raises(CorruptError) as caught:
            apply_changes(listed_T, bytes.fromhex(case["changes"]))
        assert (caught.value.kind, caught.value.facts.get("rule")) == (case["error"], case["rule"])
        return
    assert pack_list(apply_changes(listed_T, bytes.fromhex(case["changes"]))).hex() == case["result"]


def _zeros(segment: Segment) -> BitsArray:
    return np.zeros(segment.length, f"<u{segment.tensor.itemsize}")
