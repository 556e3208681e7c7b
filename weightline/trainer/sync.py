"""What passes between a rank's training thread, its background thread and rank 0. Plain frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from weightline.format.manifest import AssetRef
from weightline.types import Changes


@dataclass(frozen=True, slots=True)
class Sync:
    """One captured state on its way to become a version. The same on every rank but for `changes`."""

    sequence: int
    """Counts this process's syncs from 0."""
    epoch: int
    """Counts failures: a sync captured before one that failed is void."""
    global_step: int
    kind: Literal["anchor", "delta", "revert"]
    changes: tuple[Changes, ...] = ()
    """Of this rank's shards, against the state of the sync before. Empty for an anchor, which reads the baseline."""
    reverts_to: int | None = None
    is_milestone: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    assets: tuple[AssetRef, ...] = ()
    with_anchor: bool = False
    """Also write an anchor of this state. No later sync is captured until it is written."""


@dataclass(frozen=True, slots=True)
class PayloadPart:
    """What a rank tells rank 0 about its payload. `key` is None when nothing of its partition changed."""

    rank: int
    key: str | None = None
    nbytes: int = 0
    sha256: str = ""
    error: str | None = None
    """Why the rank has no payload up; then the version is not committed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a sync: the same on every rank."""

    sequence: int
    version: int
    status: Literal["committed", "failed", "void"]
    reason: str = ""
    is_conflict: bool = False
    """Another writer holds the version: trying again cannot help."""
    wants_anchor: bool = False
    """Late joiners would fetch more than an anchor by now: the next sync should bring one."""
