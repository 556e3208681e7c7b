"""Collecting garbage: objects that nothing kept can reach. Planned first, purely; deleted only when asked.

Never collected: what a kept version needs, what a ref or a live replica's lease stands for, and anything younger than
the grace period, since a commit under way has payloads that no manifest names yet. Ages are by the store's clock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from weightline.chain.history import Chain
from weightline.chain.horizon import oldest_kept
from weightline.chain.leases import Lease, live_leases
from weightline.chain.plan import ReplayPlan
from weightline.chain.refs import current_refs
from weightline.chain.ways import Ways, plan_between
from weightline.errors import VersionNotFoundError
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut
from weightline.store import ObjectInfo

DEFAULT_GRACE = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What would be deleted, by what it is."""

    payloads: tuple[ObjectInfo, ...]
    manifests: tuple[ObjectInfo, ...]
    shortcuts: tuple[ObjectInfo, ...]
    signatures: tuple[ObjectInfo, ...]
    assets: tuple[ObjectInfo, ...]
    probes: tuple[ObjectInfo, ...]
    leases: tuple[ObjectInfo, ...]
    """Of replicas that are gone."""

    @property
    def objects(self) -> tuple[ObjectInfo, ...]:
        """In the order of deletion: what others may refer to goes last."""
        return (
            self.shortcuts + self.manifests + self.signatures + self.payloads + self.assets + self.probes + self.leases
        )

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.objects)


@dataclass(frozen=True, slots=True)
class GcView:
    """What the bucket holds and what is kept: all that the decision needs."""

    objects: tuple[ObjectInfo, ...]
    manifests: tuple[Manifest, ...]
    shortcuts: tuple[Shortcut, ...]
    kept_versions: frozenset[int]
    """Versions from the horizon on, and those that refs and leases stand for, with all that replaying them needs."""
    kept_shortcuts: frozenset[str]
    """Keys of the shortcuts on their ways."""
    live_leases: frozenset[str] = frozenset()
    """Keys of the leases of replicas that are alive."""


def plan_gc(view: GcView, *, now: datetime, grace: timedelta = DEFAULT_GRACE) -> GcPlan:
    """Decide what to delete. Pure."""
    kept_manifests = [m for m in view.manifests if m.version in view.kept_versions]
    # A shortcut between kept versions stays even when no way leads over it today: it was written to be cheap.
    kept_shortcuts = [
        s
        for s in view.shortcuts
        if s.key in view.kept_shortcuts
        or (s.version in view.kept_versions and (s.base_version is None or s.base_version in view.kept_versions))
    ]
    needed = {ref.key for m in kept_manifests for ref in (*m.payloads, *m.assets)}
    needed |= {ref.key for s in kept_shortcuts for ref in s.payloads}
    needed |= {m.key for m in kept_manifests} | {s.key for s in kept_shortcuts}
    old = [info for info in view.objects if info.key not in needed and now - info.modified_at >= grace]

    def under(prefix: str) -> tuple[ObjectInfo, ...]:
        return tuple(info for info in old if info.key.startswith(prefix))

    return GcPlan(
        payloads=under(keys.PAYLOADS),
        manifests=under(keys.COMMITS),
        shortcuts=under(keys.SHORTCUTS),
        signatures=tuple(s for s in under(keys.SIGNATURES) if keys.subject_of_signature(s.key) not in needed),
        assets=under(keys.ASSETS),
        probes=under(keys.PROBES),
        leases=tuple(info for info in under(keys.LEASES) if info.key not in view.live_leases),
    )


def view_chain(chain: Chain, now: datetime | None = None) -> GcView:
    """Read what `plan_gc` decides on; leases that have expired by `now` keep nothing.

    Objects are listed before manifests are read: a commit under way is safe. Signatures are not asked for: what an
    unsigned object refers to is kept, too.
    """
    chain = Chain(chain.store)
    objects = tuple(
        info
        for prefix in (
            keys.PAYLOADS,
            keys.ASSETS,
            keys.SHORTCUTS,
            keys.COMMITS,
            keys.SIGNATURES,
            keys.PROBES,
            keys.LEASES,
        )
        for info in chain.store.list(prefix)
    )
    manifests = chain.manifests()
    ways = Ways(chain)
    shortcuts = tuple(s for m in manifests for s in ways.shortcuts_into(m.version))
    horizon = oldest_kept(chain)
    kept = {m.version for m in manifests if m.version >= horizon}
    pinned = {ref.version for ref in current_refs(chain).values()} | ({horizon} if kept else set())
    plans = [plan_between(chain, None, version) for version in sorted(pinned)]
    leases = live_leases(chain, now)
    plans += _plans_of_leases(chain, leased_versions(chain, leases) - pinned)
    kept |= {hop.version for plan in plans for hop in plan.hops}
    kept |= set(_bearers_of_assets(manifests, kept))
    kept_shortcuts = {
        keys.shortcut(hop.base_version, hop.version) for plan in plans for hop in plan.hops if hop.is_shortcut
    }
    live = frozenset(keys.lease(lease.replica) for lease in leases)
    return GcView(objects, manifests, shortcuts, frozenset(kept), frozenset(kept_shortcuts), live)


def _bearers_of_assets(manifests: Iterable[Manifest], kept: set[int]) -> Iterable[int]:
    """A version without assets of its own has those of the newest version before it that names any."""
    bearer: int | None = None
    for manifest in manifests:
        bearer = manifest.version if manifest.assets else bearer
        if manifest.version in kept and bearer is not None:
            yield bearer


def _plans_of_leases(chain: Chain, versions: set[int]) -> Iterable[ReplayPlan]:
    """A replica may come back to a version that nothing leads to any more: its lease keeps nothing then."""
    for version in sorted(versions):
        try:
            yield plan_between(chain, None, version)
        except VersionNotFoundError:
            continue


def leased_versions(chain: Chain, leases: Iterable[Lease]) -> set[int]:
    """Committed versions that live replicas stand at, or are on their way to."""
    committed = set(chain.versions())
    return {version for lease in leases for version in lease.versions if version in committed}


def collect(chain: Chain, plan: GcPlan) -> None:
    """Delete what was planned. Safe to repeat; a crash leaves the rest for the next time."""
    for info in plan.objects:
        chain.store.delete(info.key)
