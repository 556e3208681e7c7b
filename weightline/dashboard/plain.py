"""Documents as a browser gets them: bounded texts that UTF-8 can encode, and numbers that JSON can hold. Pure.

Manifests and records hold whatever a writer put into them. A text of 20 MB, half of a surrogate pair or a number of 400
digits must not keep a browser from the rest of the page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse

from weightline.lineage.rows import LineageRow

MAX_TEXT = 2_000
_MAX_LABEL = 200
_MAX_METRICS = 500
_MAX_INT = 2**63 - 1
_COUNTS = ("global_step", "num_changed", "num_elements", "payload_nbytes", "full_nbytes")
_LABELS = ("stage", "run_id", "created_at", "commit_id")


class PlainResponse(JSONResponse):
    """A JSON answer that can be made of any document."""

    def render(self, content: Any) -> bytes:
        return json.dumps(plain(content), ensure_ascii=False, separators=(",", ":")).encode()


def plain(value: Any) -> Any:
    """Returns a document of the same shape that JSON and UTF-8 can hold. A number that is not finite becomes null."""
    if isinstance(value, str):
        return text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return max(-_MAX_INT, min(_MAX_INT, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {text(str(key)): plain(held) for key, held in value.items()}
    return [plain(one) for one in value]


def text(value: str, max_length: int = MAX_TEXT) -> str:
    """Returns at most `max_length` characters, without halves of surrogate pairs."""
    cut = value if len(value) <= max_length else f"{value[: max_length - 3]}..."
    return cut if cut.isascii() else cut.encode("utf-8", "replace").decode()


def plain_row(row: LineageRow) -> LineageRow:
    """Returns the row with bounded labels, counts and metrics: rows of all versions are kept in memory."""
    origin = row.forked_from
    bounded: dict[str, Any] = {name: text(getattr(row, name), _MAX_LABEL) for name in _LABELS}
    bounded |= {name: plain(getattr(row, name)) for name in _COUNTS}
    return replace(
        row,
        **bounded,
        forked_from=None if origin is None else origin.model_copy(update={"chain": text(origin.chain)}),
        metrics={text(name, _MAX_LABEL): value for name, value in list(row.metrics.items())[:_MAX_METRICS]},
    )
