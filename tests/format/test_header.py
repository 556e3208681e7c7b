"""Headers of format 2, and the objects that they name, as hostile or future writers may make them."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weightline.format
from tests.conformance.shared_objects import CHANGES, HEADER, LAYOUTS, Sound, layout_bytes
from weightline.codec.varint import put_numbers
from weightline.errors import InputError, ManifestError, UnsupportedFeatureError
from weightline.format import keys
from weightline.format.header import (
    MAX_CHANGES,
    MAX_METRICS,
    MAX_PAYLOADS,
    HeaderV2,
    WireHeader,
    pack_assets,
    pack_provenance,
    parse_header,
    unpack_assets,
    unpack_provenance,
)
from weightline.format.manifest import AssetRef, PayloadRef
from weightline.format.state_digests import (
    StateDigests,
    apply_changes,
    pack_changes,
    pack_list,
    root_of,
    unpack_list,
)
from weightline.format.tensor_layout import MAX_LAYOUT_NBYTES, MAX_TENSORS, Layout, unpack_layout
from weightline.types import TensorSpec

SCHEMA = Path(weightline.format.__file__).with_name("header.schema.json")
MIB = 1 << 20


def parsed(**fields: Any) -> HeaderV2:
    found = parse_header(json.dumps(HEADER | fields).encode())
    assert isinstance(found, HeaderV2)
    return found


def test_a_round_trip_is_deterministic() -> None:
    header = parsed()
    assert parse_header(header.to_bytes()) == header
    assert json.loads(header.to_bytes()) == HEADER


def test_the_schema_in_the_package_is_that_of_the_model() -> None:
    assert json.loads(SCHEMA.read_text()) == WireHeader.model_json_schema()


def test_payloads_have_the_keys_that_their_numbers_say() -> None:
    sha256 = "A" * 43
    header = parsed(payloads=[None, [sha256, 300], None, [sha256, 4]], payload_nbytes=304)
    assert [(ref.rank, ref.key, ref.nbytes, ref.sha256) for ref in header.payloads] == [
        (rank, keys.payload(1, HEADER["commit_id"], rank), nbytes, "0" * 64) for rank, nbytes in ((1, 300), (3, 4))
    ]
    assert parse_header(header.to_bytes()) == header
    elsewhere = PayloadRef(key="payloads/x", nbytes=304, sha256="0" * 64, rank=0)
    with pytest.raises(ValueError, match="no reader derives"):
        header.model_copy(update={"payloads": (elsewhere,)}).to_bytes()


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"payloads": [["A" * 42, 300]]}, "payloads.0.0"),
        ({"payloads": [["A" * 42 + "B", 300]]}, "base64"),
        ({"payloads": [["A" * 42 + "-", 300]]}, "payloads.0.0"),
        ({"payloads": [["A" * 43, -300]]}, "payloads.0.1"),
        ({"payloads": [["A" * 43, 300, 1]]}, "payloads.0"),
        ({"payloads": [["A" * 43, 299]]}, "header"),
        ({"payloads": [None] * (MAX_PAYLOADS + 1), "payload_nbytes": 0}, "payloads"),
        ({"root": "0" * 63}, "root"),
        ({"layout": HEADER["layout"] | {"num_tensors": MAX_TENSORS + 1}}, "layout.num_tensors"),
        ({"layout": HEADER["layout"] | {"nbytes": MAX_LAYOUT_NBYTES + 1}}, "layout.nbytes"),
        ({"layout": HEADER["layout"] | {"sha256": "x" * 64}}, "layout.sha256"),
        ({"digests": HEADER["digests"] | {"changes": "A"}}, "base64"),
        ({"digests": HEADER["digests"] | {"changes": "A" * 28 * MAX_CHANGES}}, "digests.changes"),
        ({"digests": HEADER["digests"] | {"changes": "?"}}, "digests.changes"),
        ({"metrics": {str(number): 1.0 for number in range(MAX_METRICS + 1)}}, "metrics"),
        ({"assets": {"sha256": "0" * 64}}, "assets.nbytes"),
        ({"tensors": {}}, "tensors"),
        ({"base_version": None}, "header"),
        ({"num_changed": 8}, "header"),
        ({"kind": "revert"}, "header"),
        ({"stage": "\ud800"}, "json"),
    ],
)
def test_a_broken_rule_of_a_header_is_named(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parsed(**fields)
    assert caught.value.rule == rule


def test_a_header_is_small_and_a_larger_one_is_refused() -> None:
    with pytest.raises(ManifestError, match="exceeds"):
        parsed(base_model={"name_or_path": "x" * (1 << 20), "digest": "0" * 64, "num_elements": 1})


def test_a_newer_writer_is_told_from_a_broken_one() -> None:
    for fields in ({"format": "weightline/3"}, {"features": ["later"]}):
        with pytest.raises(UnsupportedFeatureError, match="upgrade"):
            parsed(**fields)


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_layouts(case: Sound | Any) -> None:
    if case.rule is None:
        assert [spec.name for spec in unpack_layout(case.raw, case.num_tensors).specs] == case.names
        return
    with pytest.raises(ManifestError) as caught:
        unpack_layout(case.raw, case.num_tensors)
    assert caught.value.rule == case.rule


def test_a_layout_that_inflates_to_gigabytes_takes_no_room() -> None:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(squeeze.compress(bytes(MIB)) for _ in range(200)) + squeeze.flush()
    assert len(bomb) < MIB
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError):
            unpack_layout(bomb, 5)
        assert tracemalloc.get_traced_memory()[1] < 2.5 * MAX_LAYOUT_NBYTES
    finally:
        tracemalloc.stop()


def test_a_layout_is_the_same_whatever_the_order_of_its_tensors() -> None:
    specs = [TensorSpec(name, "BF16", (2,)) for name in ("b", "a", "\u00e9", "\U0001f40d", "\uffff", "a.b", "")]
    layout = Layout.of(specs)
    assert [spec.name.encode() for spec in layout.specs] == sorted(spec.name.encode() for spec in specs)
    assert Layout.of(reversed(specs)).packed == layout.packed
    assert unpack_layout(layout.packed, 7) == layout
    with pytest.raises(InputError, match="one name"):
        Layout.of([*specs, TensorSpec("a", "F32", ())])
    with pytest.raises(InputError, match="no text"):
        _ = Layout.of([TensorSpec("\ud800", "F32", ())]).packed


def test_two_encodings_of_a_layout_are_equal() -> None:
    layout = Layout.of([TensorSpec("a", "BF16", (2,)), TensorSpec("b", "BF16", (2,))])
    other = zlib.compressobj(0, zlib.DEFLATED, -15)
    raw = other.compress(zlib.decompress(layout.packed, -15)) + other.flush()
    assert raw != layout.packed
    assert unpack_layout(raw, 2) == layout


def _digests(*values: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    layout = Layout.of(TensorSpec(f"{number:03d}", "U8", ()) for number in range(len(values)))
    return StateDigests.of(layout, {f"{number:03d}": value for number, value in enumerate(values)}).digests_T


def test_changes_lead_from_one_list_to_another() -> None:
    before, after = _digests(*range(300)), _digests(*range(300)).copy()
    for at in (0, 1, 130, 299):
        after[at] = (1 << 64) - 1, at
    changes, num_changes = pack_changes(before, after)
    assert (num_changes, len(changes)) == (4, 4 * 17 + 2)
    assert np.array_equal(apply_changes(before, changes), after)
    assert pack_changes(before, before) == (b"", 0)
    with pytest.raises(ValueError, match="read-only"):
        apply_changes(before, changes)[0, 0] = 1


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
def test_changes(case: Any) -> None:
    listed_T = _digests(1, 2, 3)
    if case.rule is None:
        assert pack_list(apply_changes(listed_T, case.raw)).hex() == case.result
        return
    with pytest.raises(ManifestError) as caught:
        apply_changes(listed_T, case.raw)
    assert caught.value.rule == case.rule


@pytest.mark.parametrize("nbytes", [0, 15, 47, 49, 64])
def test_a_list_of_another_length_is_refused(nbytes: int) -> None:
    with pytest.raises(ManifestError) as caught:
        unpack_list(bytes(nbytes), 3)
    assert caught.value.rule == "digests-length"


def test_a_list_is_in_the_order_of_hex_digits() -> None:
    digests_T = _digests(0x0123456789ABCDEF_FEDCBA9876543210)
    assert pack_list(digests_T).hex() == "0123456789abcdeffedcba9876543210"
    assert np.array_equal(unpack_list(pack_list(digests_T), 1), digests_T)
    assert root_of("00" * 32, digests_T) != root_of("01" + "00" * 31, digests_T)


def test_digests_are_a_mapping() -> None:
    layout = Layout.of([TensorSpec("a", "U8", ()), TensorSpec("b", "U8", ())])
    digests = StateDigests.of(layout, {"b": (1 << 128) - 1, "a": 5})
    assert dict(digests) == digests == {"a": 5, "b": (1 << 128) - 1}
    other = digests.copy()
    other["a"] = 1 << 127
    assert (digests["a"], other["a"], digests.differing(other)) == (5, 1 << 127, ["a"])
    assert digests != other
    with pytest.raises(InputError, match="has no digest"):
        StateDigests.of(layout, {"a": 1})


_ASSET = {"name": "config.json", "nbytes": 2, "sha256": "0" * 64}
BROKEN: list[tuple[Callable[[bytes], object], object, str]] = [
    (unpack_assets, [_ASSET, _ASSET], "assets"),
    (unpack_assets, [_ASSET | {"name": "../x"}], "assets"),
    (unpack_assets, [_ASSET | {"key": "x"}], "assets"),
    (unpack_assets, [_ASSET | {"nbytes": "2"}], "assets"),
    (unpack_assets, {"name": "x"}, "assets"),
    (unpack_assets, [_ASSET | {"name": f"{number}.json"} for number in range(4097)], "assets"),
    (unpack_provenance, {"host": 1}, "provenance"),
    (unpack_provenance, {"host": "x" * 65537}, "provenance"),
    (unpack_provenance, [], "provenance"),
]


@pytest.mark.parametrize(("unpack", "document", "rule"), BROKEN)
def test_a_list_of_assets_or_a_provenance_that_is_none(
    unpack: Callable[[bytes], object], document: object, rule: str
) -> None:
    for raw in (json.dumps(document).encode(), b"", b"[" * 100_000, b"\xff"):
        with pytest.raises(ManifestError) as caught:
            unpack(raw)
        assert caught.value.rule == rule


def test_lists_of_assets_are_the_same_in_any_order() -> None:
    assets = [AssetRef(key=keys.asset(c * 64), nbytes=1, sha256=c * 64, name=f"{c}.json") for c in "ba"]
    assert pack_assets(assets) == pack_assets(assets[::-1])
    assert unpack_assets(pack_assets(assets)) == tuple(assets[::-1])
    assert unpack_provenance(pack_provenance({"b": "\u00e9", "a": "1"})) == {"a": "1", "b": "\u00e9"}


def test_a_number_of_many_bytes_is_no_index() -> None:
    out = bytearray()
    put_numbers(out, (1 << 63) - 1)
    with pytest.raises(ManifestError):
        apply_changes(_digests(1), bytes(out) + bytes(16))
    assert len(layout_bytes([])) > 0
