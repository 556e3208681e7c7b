"""Curves of numbers by version. Long chains are binned: mean, minimum and maximum of every bin. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weightline.lineage.rows import LineageRow

Value = Callable[[LineageRow], float | None]

#: The series that every chain has. Their names cannot clash with those of a trainer's metrics.
OWN_SERIES: dict[str, Value] = {
    "weightline:score": lambda row: row.score,
    "weightline:changed": lambda row: None if row.kind == "anchor" else row.changed_fraction,
    "weightline:bytes": lambda row: None if row.kind == "anchor" else row.payload_nbytes,
    "weightline:pause": lambda row: row.pause_seconds,
    "weightline:lag": lambda row: row.lag_seconds,
}
MAX_NAMES = 200


def metric_names(rows: Sequence[LineageRow]) -> list[str]:
    """Returns the names of all metrics in the rows, in order of appearance, at most MAX_NAMES."""
    return list(dict.fromkeys(name for row in rows for name in row.metrics))[:MAX_NAMES]


def value_of(name: str) -> Value:
    """Returns the function that reads the series' value from a row."""
    return OWN_SERIES.get(name) or (lambda row: row.metrics.get(name))


def series(rows: Sequence[LineageRow], names: Sequence[str], max_points: int) -> dict[str, Any]:
    """Returns at most `max_points` points of every named series, oldest first. A point's version is its bin's last."""
    size = max(1, -(-len(rows) // max_points))
    bins = [rows[at : at + size] for at in range(0, len(rows), size)]
    return {
        "bin_size": size,
        "versions": [part[-1].version for part in bins],
        "stages": [part[-1].stage for part in bins],
        "series": {name: _binned(bins, value_of(name), with_range=size > 1) for name in names},
    }


def _binned(bins: Sequence[Sequence[LineageRow]], value: Value, *, with_range: bool) -> dict[str, Any]:
    held = [[number for row in part if (number := value(row)) is not None] for part in bins]
    binned: dict[str, Any] = {"mean": [sum(part) / len(part) if part else None for part in held]}
    if with_range:
        binned["min"] = [min(part, default=None) for part in held]
        binned["max"] = [max(part, default=None) for part in held]
    return binned
