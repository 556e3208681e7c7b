"""What a bucket must keep, and how old history is dropped. SPEC "Collect".

Expiry moves a horizon and deletes nothing; gc deletes what lies behind the horizon. A version stays reachable by replay
only if an anchor stands at or before it, so the horizon always has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from weightline.chain.read.history import Chain
from weightline.chain.read.leases import Lease, live_leases
from weightline.chain.read.refs import Ref, move_horizon, oldest_kept
from weightline.chain.replay.plan import ReplayPlan, Ways, plan_between
from weightline.chain.upkeep.compact import CompactionPlan, write_compaction
from weightline.codec.anchor import ANCHOR_CODING
from weightline.errors import VersionNotFoundError
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut


def first_of_newest(chain: Chain, num_versions: int) -> int:
    """Returns the oldest of the newest `num_versions` versions."""
    return max(0, chain.tip().version - num_versions + 1)


def expire_before(chain: Chain, version: int) -> int:
    """Keep `version` and later ones; older history may be collected. Returns the horizon. Safe to repeat.

    Writes an anchor at `version` first when it has none. A crash in between leaves an anchor more, and nothing less.
    """
    chain.manifest(version)
    horizon = oldest_kept(chain)
    if version <= horizon:
        return horizon
    if not any(hop.base_version is None for hop in Ways(chain)(version)):
        write_compaction(chain, CompactionPlan(version, (), {}, writes_anchor=True), coding=ANCHOR_CODING)
    move_horizon(chain, version)
    return version


@dataclass(frozen=True, slots=True)
class Kept:
    """Versions and shortcuts that must stay, with all that they name."""

    versions: frozenset[int] = frozenset()
    """From the horizon on, those that refs and leases stand for, what replaying them needs, and `bearers`."""
    bearers: frozenset[int] = frozenset()
    """Those that stay for their assets alone: what replaying them needs may be gone."""
    on_the_way: frozenset[str] = frozenset()
    """Keys of the shortcuts that replaying them takes."""
    live_leases: frozenset[str] = frozenset()
    """Keys of the leases of replicas that are alive."""
    unreachable: Mapping[int, VersionNotFoundError] = field(default_factory=dict)
    """Versions that the horizon or a ref stands for and that nothing leads to: the chain is broken."""

    def keeps_shortcut(self, shortcut: Shortcut) -> bool:
        """Keeps shortcuts between two kept versions, even if no current plan uses them."""
        if shortcut.key in self.on_the_way:
            return True
        return all(end in self.versions for end in (shortcut.base_version, shortcut.version) if end is not None)


def read_kept(chain: Chain, manifests: Sequence[Manifest], refs: Iterable[Ref], now: datetime | None = None) -> Kept:
    """Ask the bucket; leases that have expired by `now` keep nothing. `manifests`: all of the chain, oldest first."""
    horizon = oldest_kept(chain)
    kept = {m.version for m in manifests if m.version >= horizon}
    pinned = {ref.version for ref in refs} | ({horizon} if kept else set())
    leases = live_leases(chain, now)
    plans, unreachable = _plans_to(chain, pinned)
    # A replica may come back to a version that nothing leads to any more: its lease keeps nothing then.
    plans += _plans_to(chain, leased_versions(chain, leases) - pinned)[0]
    hops = [hop for plan in plans for hop in plan.hops]
    kept |= {hop.version for hop in hops}
    bearers = frozenset(_bearers_of_assets(manifests, kept)) - kept
    on_the_way = frozenset(keys.shortcut(hop.base_version, hop.version) for hop in hops if hop.is_shortcut)
    live = frozenset(keys.lease(lease.replica) for lease in leases)
    return Kept(bearers | kept, bearers, on_the_way, live, unreachable)


def _plans_to(chain: Chain, versions: Iterable[int]) -> tuple[list[ReplayPlan], dict[int, VersionNotFoundError]]:
    plans, unreachable = [], {}
    for version in sorted(versions):
        try:
            plans.append(plan_between(chain, None, version))
        except VersionNotFoundError as error:
            unreachable[version] = error
    return plans, unreachable


def _bearers_of_assets(manifests: Iterable[Manifest], kept: set[int]) -> Iterable[int]:
    """A version without assets of its own has those of the newest version before it that names any."""
    bearer: int | None = None
    for manifest in manifests:
        bearer = manifest.version if manifest.assets else bearer
        if manifest.version in kept and bearer is not None:
            yield bearer


def leased_versions(chain: Chain, leases: Iterable[Lease]) -> set[int]:
    """Committed versions that live replicas stand at, or are on their way to."""
    committed = set(chain.versions())
    return {version for lease in leases for version in lease.versions if version in committed}
