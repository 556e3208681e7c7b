"""Records as the dashboard shows them: whatever a writer left in the bucket becomes a plain, bounded document. Pure.

A record that nobody can make sense of is passed over: it must not hide the others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from weightline.format import keys

Document = dict[str, Any]

_RECORD = re.compile(rf"{keys.RECORDS}[^/]+/(?P<version>[0-9]{{20}})/(?P<name>[^/]+)\.json")
_MAX_TEXT = 500
_TEXTS = ("status", "recorded_at", "served_at", "commit_id", "state_digest", "reason", "error")
_NUMBERS = (
    "score", "num_problems", "seconds", "newer_version", "from_version", "pause_seconds", "drain_seconds",
    "prepare_seconds", "payload_nbytes", "num_changed",
)  # fmt: skip


def parse_record(key: str, raw: bytes) -> Document | None:
    """The record with the fields that are shown, each of its type or absent; None when it is none.

    Version and name are the key's: they are what makes the record unique.
    """
    found = _RECORD.fullmatch(key)
    document = parse_object(raw)
    if found is None or document is None:
        return None
    texts = {name: document[name][:_MAX_TEXT] for name in _TEXTS if isinstance(document.get(name), str)}
    numbers = {name: value for name in _NUMBERS if (value := finite(document.get(name))) is not None}
    told = {"version": int(found["version"]), "name": found["name"], "status": "unknown", **texts, **numbers}
    metrics = document.get("metrics")
    if isinstance(metrics, Mapping):
        told["metrics"] = {str(k)[:_MAX_TEXT]: number for k, v in metrics.items() if (number := finite(v)) is not None}
    return told


def parse_object(raw: bytes) -> Document | None:
    """A JSON object, or None for anything else."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def finite(value: object) -> float | int | None:
    """The number, or None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
