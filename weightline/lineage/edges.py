"""How versions hang together: deltas, reverts, and the shortcuts that compaction wrote. Pure.

The one source of every drawing of a chain: the mermaid graph of the artifact and the dashboard's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from weightline.lineage.rows import LineageRow

Shortcut = tuple[int | None, int]
"""(base_version, version); from None it is an anchor."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A way from the state of `source` to that of `target`.

    `delta`: the version's own payloads. `equals`: a revert, whose state is the source's again. `shortcut`: a compacted
    delta that skips the versions between.
    """

    kind: Literal["delta", "equals", "shortcut"]
    source: int
    target: int


def lineage_edges(rows: Sequence[LineageRow], shortcuts: Iterable[Shortcut] = ()) -> tuple[Edge, ...]:
    """Every edge that ends at one of the rows, by target; its source may be an older version that is not among them."""
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
    """Versions that got an anchor after their commit."""
    return frozenset(version for base_version, version in shortcuts if base_version is None)
