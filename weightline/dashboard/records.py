"""Parses records for display: any content of the bucket becomes a plain document of bounded size. Pure.

A record that cannot be parsed is skipped, so that it does not hide the others.
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
#: Integers up to it are floats without loss. Arithmetic with larger ones may end in an OverflowError.
_MAX_EXACT = 2**53
_TEXTS = ("status", "recorded_at", "served_at", "commit_id", "state_digest", "reason", "error")
_NUMBERS = (
    "score", "num_problems", "seconds", "newer_version", "from_version", "pause_seconds", "drain_seconds",
    "prepare_seconds", "fetch_seconds", "read_base_seconds", "decode_seconds", "stage_seconds", "payload_nbytes",
    "num_changed",
)  # fmt: skip


def parse_record(key: str, raw: bytes) -> Document | None:
    """Returns the fields of a record that are shown, each of its type or absent; None when it is not a record.

    Version and name are taken from the key, which makes the record unique.
    """
    found = _RECORD.fullmatch(key)
    document = parse_object(raw)
    if found is None or document is None:
        return None
    texts = {name: document[name][:_MAX_TEXT] for name in _TEXTS if isinstance(document.get(name), str)}
    numbers = {name: value for name in _NUMBERS if (value := finite(document.get(name))) is not None}
    record = {"version": int(found["version"]), "name": found["name"], "status": "unknown", **texts, **numbers}
    metrics = document.get("metrics")
    if isinstance(metrics, Mapping):
        record["metrics"] = {
            str(k)[:_MAX_TEXT]: number for k, v in metrics.items() if (number := finite(v)) is not None
        }
    return record


def parse_object(raw: bytes) -> Document | None:
    """Returns a JSON object; None for any other bytes."""
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def finite(value: object) -> float | int | None:
    """Returns a finite number, as a float where it is a large integer; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return None
    if not is_finite:
        return None
    return float(value) if abs(value) > _MAX_EXACT else value
