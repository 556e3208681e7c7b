"""Collecting garbage: objects that nothing kept can reach. Planned first, purely; deleted only when asked.

Never collected: what a kept version needs, what a ref or a live replica's lease stands for, and anything younger than
the grace period, since a commit under way has payloads that no manifest names yet. Ages are by the store's clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from weightline.chain.history import Chain
from weightline.chain.horizon import oldest_kept
from weightline.chain.refs import current_refs
from weightline.chain.ways import Ways, plan_between
from weightline.errors import NotFoundError
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
    assets: tuple[ObjectInfo, ...]
    probes: tuple[ObjectInfo, ...]

    @property
    def objects(self) -> tuple[ObjectInfo, ...]:
        """In the order of deletion: what others may refer to goes last."""
        return self.shortcuts + self.manifests + self.payloads + self.assets + self.probes

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
        under(keys.PAYLOADS), under(keys.COMMITS), under(keys.SHORTCUTS), under(keys.ASSETS), under(keys.PROBES)
    )


def view_chain(chain: Chain) -> GcView:
    """Read what `plan_gc` decides on. Objects are listed before manifests are read: a commit under way is safe."""
    objects = tuple(
        info
        for prefix in (keys.PAYLOADS, keys.ASSETS, keys.SHORTCUTS, keys.COMMITS, keys.PROBES)
        for info in chain.store.list(prefix)
    )
    manifests = chain.manifests()
    ways = Ways(chain)
    shortcuts = tuple(s for m in manifests for s in ways.shortcuts_into(m.version))
    horizon = oldest_kept(chain)
    kept = {m.version for m in manifests if m.version >= horizon}
    pinned = {ref.version for ref in current_refs(chain).values()} | leased_versions(chain)
    plans = [plan_between(chain, None, version) for version in sorted(pinned | ({horizon} if kept else set()))]
    kept |= {hop.version for plan in plans for hop in plan.hops}
    kept |= set(_bearers_of_assets(manifests, kept))
    kept_shortcuts = {
        keys.shortcut(hop.base_version, hop.version) for plan in plans for hop in plan.hops if hop.is_shortcut
    }
    return GcView(objects, manifests, shortcuts, frozenset(kept), frozenset(kept_shortcuts))


def _bearers_of_assets(manifests: Iterable[Manifest], kept: set[int]) -> Iterable[int]:
    """A version without assets of its own has those of the newest version before it that names any."""
    bearer: int | None = None
    for manifest in manifests:
        bearer = manifest.version if manifest.assets else bearer
        if manifest.version in kept and bearer is not None:
            yield bearer


def leased_versions(chain: Chain) -> set[int]:
    """Versions that replicas say they stand at (`records/replicas/`)."""
    versions = set()
    for info in chain.store.list(f"{keys.RECORDS}replicas/"):
        try:
            lease = json.loads(chain.store.get(info.key))
        except NotFoundError:
            continue
        if isinstance(lease.get("version"), int):
            versions.add(lease["version"])
    return versions


def collect(chain: Chain, plan: GcPlan) -> None:
    """Delete what was planned. Safe to repeat; a crash leaves the rest for the next time."""
    for info in plan.objects:
        chain.store.delete(info.key)
