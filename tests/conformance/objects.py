"""Manifests and shortcuts as cases: sound ones, and each of them with one thing changed that a reader must refuse."""

from __future__ import annotations

import copy
import json
from typing import Any

Document = dict[str, Any]
#: Path of the field that is changed, its new value, and the kind of error; `_GONE` takes the field away.
Change = tuple[tuple[str | int, ...], object, str]
_GONE = "gone"

_ZEROS, _ONES = "0" * 32, "1" * 32
_PAYLOAD = {"key": f"payloads/00000000000000000001/{_ONES}/rank-00000.safetensors", "nbytes": 300, "rank": 0}
_BASE = {"name_or_path": "owner/base", "digest": "2" * 64, "num_elements": 100}
_TENSORS = {
    "w": {"dtype": "BF16", "shape": [2, 3], "digest": "00112233445566778899aabbccddeeff"},
    "scale": {"dtype": "F32", "shape": [], "digest": _ZEROS},
    "empty": {"dtype": "U8", "shape": [0, 4], "digest": _ZEROS},
}

DELTA: Document = {
    "format": "weightline/1", "features": [], "version": 1, "base_version": 0, "kind": "delta", "reverts_to": None,
    "forked_from": None, "base_model": None, "commit_id": _ONES, "created_at": "2026-01-01T00:00:00+00:00",
    "run_id": "run-1", "stage": "sft", "global_step": 7, "is_milestone": False, "coding": "gap", "world_size": 1,
    "num_changed": 2, "num_elements": 7, "payload_nbytes": 300, "full_nbytes": 16,
    "payloads": [_PAYLOAD | {"sha256": "3" * 64}],
    "assets": [{"key": f"assets/{'4' * 64}", "nbytes": 2, "sha256": "4" * 64, "name": "config.json"}],
    "tensors": _TENSORS, "metrics": {"loss": 0.5}, "provenance": {"host": "h"},
}  # fmt: skip
SHORTCUT: Document = {
    "format": "weightline/1", "features": [], "version": 5, "base_version": 2, "commit_id": _ONES,
    "base_commit_id": _ZEROS, "created_at": "2026-01-01T00:00:00+00:00", "coding": "gap", "num_changed": 2,
    "payload_nbytes": 300, "payloads": [_PAYLOAD | {"sha256": "3" * 64}],
}  # fmt: skip

_ASSET = {"key": f"assets/{'5' * 64}", "nbytes": 2, "sha256": "5" * 64}
_PATHS = (
    "__init__.py", "additional_chat_templates/tool_use.jinja", "code/layers/__init__.py", "1_Pooling/model.safetensors",
    "additional_chat_templates/with a space.jinja", "vocabulaire fran\u00e7ais.txt",
)  # fmt: skip
_MX = {
    "blocks": {"dtype": "F4", "shape": [4, 16], "digest": _ZEROS},
    "scales": {"dtype": "F8_E8M0", "shape": [4, 1], "digest": _ZEROS},
}

SOUND: dict[str, tuple[str, Document]] = {
    "a delta": ("manifest", DELTA),
    "an anchor": ("manifest", DELTA | {"version": 0, "base_version": None, "kind": "anchor", "num_changed": 7}),
    "a revert": ("manifest", DELTA | {"version": 3, "base_version": 2, "kind": "revert", "reverts_to": 1}),
    "a delta of nothing": ("manifest", DELTA | {"num_changed": 0, "payload_nbytes": 0, "payloads": []}),
    "an adapter": ("manifest", DELTA | {"base_model": _BASE}),
    "a fork": ("manifest", DELTA | {"forked_from": {"chain": "file:///x", "version": 3, "commit_id": _ZEROS}}),
    "small files in folders": (
        "manifest",
        DELTA | {"features": ["asset-paths"], "assets": [_ASSET | {"name": path} for path in _PATHS]},
    ),
    "mx dtypes": (
        "manifest",
        DELTA | {"features": ["mx-dtypes"], "tensors": _MX, "num_elements": 68, "full_nbytes": 68},
    ),
    "a compacted delta": ("shortcut", SHORTCUT),
    "a late joiner's anchor": ("shortcut", SHORTCUT | {"base_version": None, "base_commit_id": None}),
}

_EITHER: list[Change] = [
    (("format",), "weightline/2", "unsupported-feature"), (("features",), ["later"], "unsupported-feature"),
    (("format",), _GONE, "manifest"), (("format",), "other/1", "manifest"), (("features",), "later", "manifest"),
    (("later",), 1, "manifest"), (("version",), -1, "manifest"), (("version",), "1", "manifest"),
    (("version",), True, "manifest"), (("version",), 1.5, "manifest"), (("version",), _GONE, "manifest"),
    (("commit_id",), "x" * 32, "manifest"), (("commit_id",), "A" * 32, "manifest"), (("commit_id",), "1", "manifest"),
    (("num_changed",), -1, "manifest"), (("payload_nbytes",), 301, "manifest"), (("coding",), None, "manifest"),
    (("payloads", 0, "key"), "../x", "manifest"), (("payloads", 0, "key"), "/x", "manifest"),
    (("payloads", 0, "key"), "a//b", "manifest"), (("payloads", 0, "key"), "a/./b", "manifest"),
    (("payloads", 0, "key"), "a\\b", "manifest"), (("payloads", 0, "key"), "", "manifest"),
    (("payloads", 0, "key"), "x" * 1025, "manifest"), (("payloads", 0, "nbytes"), -300, "manifest"),
    (("payloads", 0, "sha256"), "3" * 63, "manifest"), (("payloads", 0, "later"), 1, "manifest"),
]  # fmt: skip
_MANIFEST: list[Change] = [
    (("base_version",), None, "manifest"), (("kind",), "anchor", "manifest"), (("kind",), "branch", "manifest"),
    (("version",), 2, "manifest"), (("reverts_to",), 0, "manifest"), (("kind",), "revert", "manifest"),
    (("num_elements",), 8, "manifest"), (("full_nbytes",), 15, "manifest"), (("num_changed",), 8, "manifest"),
    (("world_size",), 0, "manifest"), (("tensors", "w", "dtype"), "BF17", "manifest"),
    (("tensors", "w", "shape"), [-2, -3], "manifest"), (("tensors", "w", "shape"), [3, 3], "manifest"),
    (("tensors", "w", "shape"), 6, "manifest"), (("tensors", "empty", "shape"), [0, *[1] * 32], "manifest"),
    (("tensors", "w", "digest"), "0" * 31, "manifest"), (("tensors", "w"), None, "manifest"),
    (("assets", 0, "name"), "../x", "manifest"), (("assets", 0, "name"), ".x", "manifest"),
    (("base_model",), {"name_or_path": "x"}, "manifest"), (("metrics",), {"loss": "low"}, "manifest"),
]  # fmt: skip
_SHORTCUT: list[Change] = [
    (("base_version",), 5, "manifest"), (("base_version",), 6, "manifest"), (("base_version",), None, "manifest"),
    (("base_commit_id",), None, "manifest"),
]  # fmt: skip
_ASSET_NAMES: list[Change] = [
    (("assets", 0, "name"), name, "manifest")
    for name in (
        "", "/etc/passwd", "a/../b", "a//b", "a/./b", "a/", "a/.b", "a\\b", "C:x", "a\nb", "a\u0000", "\ud800",
        "a ", "a.", "x" * 129, "/".join(["x" * 100] * 6), "model.safetensors", "Model.Safetensors", "weightline.json",
        "model.safetensors.index.json", 1,
    )
]  # fmt: skip
_ASSET_NAMES += [
    (("assets",), [_ASSET | {"name": "a"}, _ASSET | {"name": "a"}], "manifest"),
    (("assets",), [_ASSET | {"name": "a"}, _ASSET | {"name": "a/b"}], "manifest"),
    (("assets",), [_ASSET | {"name": "a/b/c"}, _ASSET | {"name": "a/b"}], "manifest"),
]
#: A tensor that nobody can hold, its counts adding up.
_HUGE = DELTA | {
    "tensors": {"w": {"dtype": "U8", "shape": [2**57], "digest": _ZEROS}}, "num_elements": 2**57, "full_nbytes": 2**57,
}  # fmt: skip
_TEXTS = {"nothing": "", "cut off": "{", "a list": "[]", "a number": "1", "null": "null", "deep": "[" * 10_000}


def object_cases() -> list[dict[str, str]]:
    """Every case: the text, what it is read as, and the kind of error that a reader gives (none: it is sound)."""
    cases = [
        {"case": name, "object": kind, "text": json.dumps(document, separators=(",", ":"))}
        for name, (kind, document) in SOUND.items()
    ]
    changes = [("manifest", DELTA, change) for change in (*_EITHER, *_MANIFEST, *_ASSET_NAMES)]
    changes += [("shortcut", SHORTCUT, change) for change in (*_EITHER, *_SHORTCUT)]
    for kind, document, (path, value, error) in changes:
        name = f"{'.'.join(map(str, path))}: {json.dumps(value)[:30]}"
        text = json.dumps(_changed(document, path, value), separators=(",", ":"))
        cases.append({"case": name, "object": kind, "text": text, "error": error})
    texts = {"2^57 elements": json.dumps(_HUGE, separators=(",", ":")), **_TEXTS}
    for kind in ("manifest", "shortcut"):
        cases += [{"case": name, "object": kind, "text": text, "error": "manifest"} for name, text in texts.items()]
    return cases


def _changed(document: Document, path: tuple[str | int, ...], value: object) -> Document:
    changed: Any = copy.deepcopy(document)
    place = changed
    for part in path[:-1]:
        place = place[part]
    if value is _GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return changed
