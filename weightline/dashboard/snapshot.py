"""What the dashboard knows of a chain at one moment. Immutable; pages are made from it by pure functions."""

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
    """A chain as its bucket showed it."""

    generation: int = 0
    """Grows with every change."""
    state: ChainState = "loading"
    """`loading` until the first look at the bucket; `unreachable`: what is told here is older than the bucket."""
    problem: str | None = None
    """Why it is unreachable, or that a look at it takes long."""
    versions: tuple[int, ...] = ()
    """Committed, ascending."""
    rows: tuple[LineageRow, ...] = ()
    """Of the versions that were read so far, ascending. The newest are read first."""
    broken: Mapping[int, str] = field(default_factory=dict)
    """Versions whose manifest cannot be read, with the reason."""
    oldest_kept: int = 0
    shortcuts: tuple[Shortcut, ...] = ()
    refs: Mapping[str, int] = field(default_factory=dict)
    """Version of every name."""
    evaluations: Mapping[int, Sequence[Document]] = field(default_factory=dict)
    refreshes: Mapping[int, Sequence[Document]] = field(default_factory=dict)
    replicas: tuple[Document, ...] = ()
    """The replicas that hold a lease, or, where none does, that have left a record: name, version, since, state."""

    @property
    def tip(self) -> int | None:
        return self.versions[-1] if self.versions else None

    @property
    def num_pending(self) -> int:
        """Versions that are still to be read."""
        return len(self.versions) - len(self.rows) - len(self.broken)

    @property
    def missing(self) -> tuple[tuple[int, int], ...]:
        """Gaps (first, last) among the versions that history keeps: a chain that cannot be whole."""
        kept = self.versions[bisect_left(self.versions, self.oldest_kept) :]
        gaps = [(a + 1, b - 1) for a, b in pairwise(kept) if b > a + 1]
        if kept and kept[0] > self.oldest_kept:
            gaps.insert(0, (self.oldest_kept, kept[0] - 1))
        return tuple(gaps)

    @property
    def stages(self) -> tuple[str, ...]:
        """In order of appearance: a stage's place gives its colour."""
        return tuple(dict.fromkeys(row.stage for row in self.rows))

    def window(self, first: int, last: int) -> tuple[LineageRow, ...]:
        """The rows of versions first..last."""
        low = bisect_left(self.rows, first, key=lambda row: row.version)
        high = bisect_right(self.rows, last, key=lambda row: row.version)
        return self.rows[low:high]

    def row(self, version: int) -> LineageRow | None:
        found = self.window(version, version)
        return found[0] if found else None
