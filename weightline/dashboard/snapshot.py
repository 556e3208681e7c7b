"""The dashboard's immutable snapshot of a chain, from which pure functions make the pages."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from weightline.dashboard.records import Document
from weightline.lineage.edges import Shortcut
from weightline.lineage.rows import LineageRow

ChainState = Literal["loading", "ready", "unreachable"]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of a chain at one moment."""

    generation: int = 0
    """Number that grows with every change."""
    state: ChainState = "loading"
    """`loading` until the first refresh; `unreachable` after one that failed: the snapshot may be outdated."""
    problem: str | None = None
    """The reason why the bucket is unreachable, or a note that a refresh takes long."""
    versions: tuple[int, ...] = ()
    """The committed versions, ascending."""
    rows: tuple[LineageRow, ...] = ()
    """Rows of the versions that were read so far, ascending. The newest are read first."""
    broken: Mapping[int, str] = field(default_factory=dict)
    """Versions whose manifest cannot be read, with the reason."""
    oldest_kept: int = 0
    shortcuts: tuple[Shortcut, ...] = ()
    refs: Mapping[str, int] = field(default_factory=dict)
    """The version of every ref."""
    evaluations: Mapping[int, Sequence[Document]] = field(default_factory=dict)
    refreshes: Mapping[int, Sequence[Document]] = field(default_factory=dict)
    logged: Mapping[int, Sequence[Document]] = field(default_factory=dict)
    """Metrics that training logged after the commit."""
    replicas: tuple[Document, ...] = ()
    """The replicas that have a lease, or without any lease those with a record: name, version, since, state."""

    @property
    def tip(self) -> int | None:
        return self.versions[-1] if self.versions else None

    @property
    def num_pending(self) -> int:
        """Returns the number of versions that are still to be read."""
        return len(self.versions) - len(self.rows) - len(self.broken)

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Returns the gaps (first, last) among the versions from the horizon on. A complete chain has none."""
        kept = self.versions[bisect_left(self.versions, self.oldest_kept) :]
        gaps = [(a + 1, b - 1) for a, b in pairwise(kept) if b > a + 1]
        if kept and kept[0] > self.oldest_kept:
            gaps.insert(0, (self.oldest_kept, kept[0] - 1))
        return tuple(gaps)

    @property
    def stages(self) -> tuple[str, ...]:
        """Returns the stages in order of appearance, which determines their colors."""
        return tuple(dict.fromkeys(row.stage for row in self.rows))

    def window(self, first: int, last: int) -> tuple[LineageRow, ...]:
        """Returns the rows of versions first..last."""
        low = bisect_left(self.rows, first, key=lambda row: row.version)
        high = bisect_right(self.rows, last, key=lambda row: row.version)
        return self.rows[low:high]

    def row(self, version: int) -> LineageRow | None:
        found = self.window(version, version)
        return found[0] if found else None
