"""The edges between versions: deltas, reverts, and the shortcuts that compaction wrote. Pure.

The mermaid graph of the Prefect artifact and the graph of the dashboard are both drawn from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from weightline.lineage.rows import LineageRow

Shortcut = tuple[int | None, int]
"""(base_version, version). An anchor has the base_version None."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A relation between the states of `source` and `target`.

    `delta`: the version's own payloads. `equals`: a revert, whose state equals the source's. `shortcut`: a compacted
    delta that skips the versions between.
    """

    kind: Literal["delta", "equals", "shortcut"]
    source: int
    target: int


def lineage_edges(rows: Sequence[LineageRow], shortcuts: Iterable[Shortcut] = ()) -> tuple[Edge, ...]:
    """Returns every edge that ends at one of the rows, ordered by target. Its source may be missing in the rows."""
    of_target: dict[int, list[Edge]] = {row.version: [] for row in rows}
    for row in rows:
        if row.base_version is not None:
            of_target[row.version].append(Edge("delta", row.base_version, row.version))
        if row.reverts_to is not None:
            of_target[row.version].append(Edge("equals", row.reverts_to, row.version))
    for base_version, version in shortcuts:
        if base_version is not None and version in of_target:
            of_target[version].append(Edge("shortcut", base_version, version))
    return tuple(edge for edges in of_target.values() for edge in edges)


def anchored_versions(shortcuts: Iterable[Shortcut]) -> frozenset[int]:
    """Returns the versions that got an anchor after their commit."""
    return frozenset(version for base_version, version in shortcuts if base_version is None)
