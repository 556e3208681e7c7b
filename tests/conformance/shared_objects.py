"""Layouts, changes of digests and roots as cases: sound ones, and crafted ones that a reader must refuse."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.conformance.objects import DELTA
from weightline.codec.varint import put_numbers
from weightline.format.header import ref_to
from weightline.format.state_digests import StateDigests, root_of
from weightline.format.tensor_layout import MAX_TENSORS, Layout
from weightline.types import TensorSpec

Document = dict[str, Any]
#: (shared, suffix, dtype, dimensions), as the format stores it.
Entry = tuple[int, bytes, int, tuple[int, ...]]
BF16, F32, U8 = 8, 11, 1
DIGESTS = {"empty": 0, "scale": 0, "w": 0x00112233445566778899AABBCCDDEEFF}
SPECS = (TensorSpec("empty", "U8", (0, 4)), TensorSpec("scale", "F32", ()), TensorSpec("w", "BF16", (2, 3)))
LAYOUT = Layout.of(SPECS)
STATE = StateDigests.of(LAYOUT, DIGESTS)


@dataclass(frozen=True)
class Sound:
    """Bytes of a layout or of changes, and what a reader makes of them; `rule`: why it refuses them."""

    name: str
    raw: bytes
    num_tensors: int = 0
    names: list[str] = field(default_factory=list)
    result: str = ""
    rule: str | None = None


def layout_bytes(entries: Sequence[Entry], count: int | None = None, rest: bytes = b"") -> bytes:
    """A layout of these entries, right or wrong; `count` is what it claims."""
    out = bytearray()
    put_numbers(out, len(entries) if count is None else count)
    for shared, suffix, dtype, dims in entries:
        put_numbers(out, shared, len(suffix))
        out += suffix
        put_numbers(out, dtype, len(dims), *dims)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    return deflate.compress(bytes(out) + rest) + deflate.flush()


A, B = (0, b"a.weight", BF16, (2, 3)), (0, b"b", F32, ())
LAYOUTS = [
    Sound("no tensors", layout_bytes([]), 0, []),
    Sound("a shared prefix", layout_bytes([A, (2, b"x", BF16, (2,))]), 2, ["a.weight", "a.x"]),
    Sound("a scalar and an empty name", layout_bytes([(0, b"", U8, ()), A, B]), 3, ["", "a.weight", "b"]),
    Sound("one name twice", layout_bytes([A, (8, b"", F32, ())]), 2, rule="layout-order"),
    Sound("names that descend", layout_bytes([B, A]), 2, rule="layout-order"),
    Sound("fewer tensors than claimed", layout_bytes([A, B], 3), 3, rule="layout-number"),
    Sound("more tensors than claimed", layout_bytes([A, B], 1), 1, rule="layout-trailing"),
    Sound("another number than the header's", layout_bytes([A, B]), 3, rule="layout-count"),
    Sound("more tensors than are read", layout_bytes([], MAX_TENSORS + 1), MAX_TENSORS + 1, rule="layout-count"),
    Sound("bytes that follow", layout_bytes([A], rest=b"\0"), 1, rule="layout-trailing"),
    Sound("bytes after the stream", layout_bytes([A]) + b"\0", 1, rule="layout-deflate"),
    Sound("a stream cut off", layout_bytes([A])[:-2], 1, rule="layout-deflate"),
    Sound("no stream", b"\xff\xff", 1, rule="layout-deflate"),
    Sound("a name that shares what is not there", layout_bytes([(1, b"a", BF16, ())]), 1, rule="layout-name"),
    Sound("a name that is no text", layout_bytes([(0, b"\xff", BF16, ())]), 1, rule="layout-name"),
    Sound("an unknown dtype", layout_bytes([(0, b"a", 99, ())]), 1, rule="layout-dtype"),
    Sound("33 dimensions", layout_bytes([(0, b"a", BF16, (1,) * 33)]), 1, rule="layout-shape"),
    Sound("2^57 elements", layout_bytes([(0, b"a", BF16, (0, 1 << 57))]), 1, rule="layout-shape"),
]

_ONE = bytes.fromhex("00112233445566778899aabbccddeeff")
_LISTED = [number.to_bytes(16, "big") for number in (1, 2, 3)]
CHANGES = [
    Sound("none", b"", result=b"".join(_LISTED).hex()),
    Sound("the first", b"\0" + _ONE, result=b"".join([_ONE, *_LISTED[1:]]).hex()),
    Sound("the last", b"\2" + _ONE, result=b"".join([*_LISTED[:2], _ONE]).hex()),
    Sound("all", 3 * (b"\0" + _ONE), result=(3 * _ONE).hex()),
    Sound("the first and the last", b"\0" + _ONE + b"\1" + _ONE, result=b"".join([_ONE, _LISTED[1], _ONE]).hex()),
    Sound("beyond the layout", b"\3" + _ONE, rule="changes-index"),
    Sound("one more than there are", 4 * (b"\0" + _ONE), rule="changes-index"),
    Sound("a digest cut off", b"\0" + _ONE[:-1], rule="changes"),
    Sound("an index without a digest", b"\0", rule="changes"),
    Sound("a number of 64 bits", b"\xff" * 10 + _ONE, rule="changes"),
]

_LAYOUT_REF = {"sha256": LAYOUT.sha256, "nbytes": len(LAYOUT.packed), "num_tensors": 3}
_GONE = ("assets", "tensors", "provenance")
#: The delta of the cases of format 1, as a header.
HEADER: Document = {key: value for key, value in DELTA.items() if key not in _GONE} | {
    "format": "weightline/2", "payloads": [["M" * 42 + "A", 300]], "layout": _LAYOUT_REF,
    "digests": {"sha256": "6" * 64, "changes": ""}, "root": root_of(LAYOUT.sha256, STATE.digests_T),
    "assets": {"sha256": "7" * 64, "nbytes": 2}, "provenance": {"sha256": "8" * 64, "nbytes": 2},
}  # fmt: skip
_CHANGED: list[tuple[str, Document, str]] = [
    ("a later format", {"format": "weightline/3"}, "unsupported-feature"),
    ("a later feature", {"features": ["later"]}, "unsupported-feature"),
    ("tensors as in format 1", {"tensors": {}}, "manifest"),
    ("payloads as in format 1", {"payloads": DELTA["payloads"]}, "manifest"),
    ("a payload's hash in hex", {"payloads": [["3" * 64, 300]]}, "manifest"),
    ("a payload's hash with bits that say nothing", {"payloads": [["M" * 42 + "B", 300]]}, "manifest"),
    ("payloads that do not add up", {"payloads": [None]}, "manifest"),
    ("a root cut off", {"root": "0" * 63}, "manifest"),
    ("no layout", {"layout": None}, "manifest"),
    ("a layout without its number of tensors", {"layout": {"sha256": "0" * 64, "nbytes": 2}}, "manifest"),
    ("more tensors than are read", {"layout": _LAYOUT_REF | {"num_tensors": MAX_TENSORS + 1}}, "manifest"),
    ("changes that are not base64", {"digests": {"sha256": "6" * 64, "changes": "*"}}, "manifest"),
    ("changes with padding", {"digests": {"sha256": "6" * 64, "changes": "AA=="}}, "manifest"),
    ("an anchor with a base", {"kind": "anchor"}, "manifest"),
    ("a base that is not the version before", {"base_version": 7}, "manifest"),
    ("more changes than elements", {"num_changed": 8}, "manifest"),
]


def header_cases() -> list[dict[str, str]]:
    """Headers as text, in the form of `object_cases`."""
    sound = {
        "a delta": HEADER,
        "an anchor": HEADER | {"version": 0, "base_version": None, "kind": "anchor", "num_changed": 7},
        "a rank without a payload": HEADER | {"payloads": [None, *HEADER["payloads"]]},
        "a delta of nothing": HEADER | {"num_changed": 0, "payload_nbytes": 0, "payloads": []},
        "a model without small files": HEADER | {"assets": None, "provenance": None},
        "changes": HEADER | {"digests": {"sha256": "6" * 64, "changes": "AAARIjNEVWZ3iJmqu8zd7v8"}},
    }
    cases = [{"case": name, "object": "header", "text": json.dumps(found)} for name, found in sound.items()]
    return cases + [
        {"case": name, "object": "header", "text": json.dumps(HEADER | fields), "error": error}
        for name, fields, error in _CHANGED
    ]


def layout_cases() -> list[dict[str, Any]]:
    """Layouts in hex, with their names in order or the rule that they break."""
    return [_case(one, layout=one.raw.hex(), num_tensors=one.num_tensors, names=one.names) for one in LAYOUTS]


def state_cases() -> list[dict[str, Any]]:
    """Changes of a list of the digests 1, 2 and 3 in hex, and roots."""
    changes = [_case(one, changes=one.raw.hex(), result=one.result) for one in CHANGES]
    roots = [
        {"case": "a root", "layout_sha256": ref_to(layout.packed).sha256, "digests": list(digests.values()),
         "root": StateDigests.of(layout, {n: int(d, 16) for n, d in digests.items()}).root(layout.sha256)}
        for layout, digests in ((LAYOUT, STATE.formatted()), (Layout.of([]), {}))
    ]  # fmt: skip
    return [*changes, *roots]


def _case(one: Sound, **fields: Any) -> dict[str, Any]:
    if one.rule is None:
        return {"case": one.name, **fields}
    kept = {key: value for key, value in fields.items() if key not in ("names", "result")}
    return {"case": one.name, **kept, "error": "manifest", "rule": one.rule}
