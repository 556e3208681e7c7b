"""Rows for tests: plain values, everything else filled in."""

from __future__ import annotations

from typing import Any

from weightline.lineage.rows import LineageRow


def row(version: int, **facts: Any) -> LineageRow:
    """A delta of stage sft, unless told otherwise."""
    plain: dict[str, Any] = {
        "stage": "sft", "kind": "delta", "global_step": version, "run_id": "run-1", "is_milestone": False,
        "base_version": version - 1 if version else None, "reverts_to": None, "num_changed": 10, "num_elements": 1000,
        "payload_nbytes": 1234, "full_nbytes": 2000, "evaluation": "waiting", "score": None, "serving": "waiting",
        "served_at": None, "pause_seconds": None,
    }  # fmt: skip
    return LineageRow(version=version, **{**plain, **facts})
