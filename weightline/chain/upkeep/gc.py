"""Garbage collection: deletes objects that no kept version needs. A pure function plans; `collect` deletes.

Never collected: objects that a kept version needs, versions that a ref or a live replica's lease names, and any object
younger than the grace period, since a commit under way has payloads that no manifest names yet. Ages are by the store's
clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import current_refs
from weightline.chain.replay.plan import Ways
from weightline.chain.upkeep.retention import Kept, read_kept
from weightline.errors import StorageError
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.format.shortcut import Shortcut
from weightline.store import ObjectInfo

DEFAULT_GRACE = timedelta(hours=24)
#: Some stores report whole seconds in one reply and fractions in another.
_CLOCK_GRAIN = timedelta(seconds=1)
_COLLECTED = (
    keys.PAYLOADS, keys.ASSETS, keys.SHORTCUTS, keys.COMMITS, keys.SIGNATURES, keys.PROBES, keys.LEASES,
)  # fmt: skip
#: Objects below these prefixes name other objects or versions that must be kept.
_LEADING = (keys.COMMITS, keys.SHORTCUTS, keys.REFS)


@dataclass(frozen=True, slots=True)
class GcPlan:
    """The objects to delete, by their kind."""

    payloads: tuple[ObjectInfo, ...]
    manifests: tuple[ObjectInfo, ...]
    shortcuts: tuple[ObjectInfo, ...]
    signatures: tuple[ObjectInfo, ...]
    assets: tuple[ObjectInfo, ...]
    probes: tuple[ObjectInfo, ...]
    leases: tuple[ObjectInfo, ...]
    """Leases of replicas that are gone."""
    staged: tuple[ObjectInfo, ...]
    """Temporary files that killed writers left in a bucket that is a local folder."""

    @property
    def objects(self) -> tuple[ObjectInfo, ...]:
        """Returns all objects in the order of deletion: objects that others refer to are deleted after those."""
        return (
            *self.shortcuts, *self.manifests, *self.signatures, *self.payloads, *self.assets, *self.probes,
            *self.leases, *self.staged,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.objects)


@dataclass(frozen=True, slots=True)
class GcView:
    """The objects of the bucket and the versions that are kept: the input of `plan_gc`."""

    objects: tuple[ObjectInfo, ...]
    manifests: tuple[Manifest, ...]
    shortcuts: tuple[Shortcut, ...]
    kept: Kept
    staged: tuple[ObjectInfo, ...] = ()
    """The objects below the store's staging prefix."""


def plan_gc(view: GcView, *, now: datetime, grace: timedelta = DEFAULT_GRACE) -> GcPlan:
    """Returns the objects to delete. Pure."""
    kept_manifests = [m for m in view.manifests if m.version in view.kept.versions]
    kept_shortcuts = [s for s in view.shortcuts if view.kept.keeps_shortcut(s)]
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
        leases=tuple(info for info in under(keys.LEASES) if info.key not in view.kept.live_leases),
        staged=tuple(info for info in view.staged if now - info.modified_at >= grace),
    )


def view_chain(chain: Chain, now: datetime | None = None) -> GcView:
    """Reads the input of `plan_gc`. Leases that have expired by `now` keep nothing.

    Objects are listed before manifests are read, so a commit under way is safe. Signatures are not checked: objects
    that an unsigned manifest names are kept, too. VersionNotFoundError when a ref or the horizon names a version that
    cannot be replayed: verify such a chain first. StorageError while a version, a shortcut or a ref is won and not yet
    published. In both cases nothing is collected.
    """
    chain = Chain(chain.store)
    objects = tuple(info for prefix in _COLLECTED for info in chain.store.list(prefix))
    staging_prefix = chain.store.staging_prefix
    staged = tuple(chain.store.list(staging_prefix)) if staging_prefix else ()
    _require_published(chain)  # before manifests are read, so that those published meanwhile are among them
    manifests = chain.manifests()
    ways = Ways(chain)
    shortcuts = tuple(s for m in manifests for s in ways.shortcuts_into(m.version))
    kept = read_kept(chain, manifests, current_refs(chain).values(), now)
    for error in kept.unreachable.values():
        raise error
    return GcView(objects, manifests, shortcuts, kept, staged)


def _require_published(chain: Chain) -> None:
    """Raises StorageError while a key is won and not published.

    The next writer of the key publishes the winner's manifest, however old it is, and its objects must still exist.
    """
    pending = [c.key for c in chain.store.contests() if c.kind == "unpublished" and c.key.startswith(_LEADING)]
    if pending:
        raise StorageError(
            f"{chain.url} has keys that a writer won and never published ({', '.join(pending)}): nothing can be "
            "collected, since the objects that they need are unknown. `weightline verify` says how to finish each",
            keys=pending, url=chain.url,
        )  # fmt: skip


def collect(chain: Chain, plan: GcPlan) -> None:
    """Deletes the planned objects. Safe to repeat; a crash leaves the rest for the next run."""
    for info in plan.objects:
        if not _is_put_again(chain, info):
            chain.store.delete(info.key)


def _is_put_again(chain: Chain, info: ObjectInfo) -> bool:
    """Returns whether an asset was put again since the plan was made, as by a commit that is under way."""
    found = chain.store.head(info.key) if info.key.startswith(keys.ASSETS) else None
    return found is not None and found.modified_at - info.modified_at > _CLOCK_GRAIN
