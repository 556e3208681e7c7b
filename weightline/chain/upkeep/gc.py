"""Collecting garbage: objects that nothing kept can reach. Planned first, purely; deleted only when asked.

Never collected: what a kept version needs, what a ref or a live replica's lease stands for, and anything younger than
the grace period, since a commit under way has payloads that no manifest names yet. Ages are by the store's clock.
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
#: Some stores tell whole seconds in one reply and fractions in another.
_CLOCK_GRAIN = timedelta(seconds=1)
_COLLECTED = (
    keys.PAYLOADS, keys.ASSETS, keys.SHORTCUTS, keys.COMMITS, keys.SIGNATURES, keys.PROBES, keys.LEASES,
)  # fmt: skip
#: What stands here says which other objects are needed.
_LEADING = (keys.COMMITS, keys.SHORTCUTS, keys.REFS)


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
    staged: tuple[ObjectInfo, ...]
    """What writers that were killed left in a bucket that is a folder."""

    @property
    def objects(self) -> tuple[ObjectInfo, ...]:
        """In the order of deletion: what others may refer to goes last."""
        return (
            *self.shortcuts, *self.manifests, *self.signatures, *self.payloads, *self.assets, *self.probes,
            *self.leases, *self.staged,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.objects)


@dataclass(frozen=True, slots=True)
class GcView:
    """What the bucket holds and what is kept: all that the decision needs."""

    objects: tuple[ObjectInfo, ...]
    manifests: tuple[Manifest, ...]
    shortcuts: tuple[Shortcut, ...]
    kept: Kept
    staged: tuple[ObjectInfo, ...] = ()
    """What the store holds below its staging prefix."""


def plan_gc(view: GcView, *, now: datetime, grace: timedelta = DEFAULT_GRACE) -> GcPlan:
    """Decide what to delete. Pure."""
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
    """Read what `plan_gc` decides on; leases that have expired by `now` keep nothing.

    Objects are listed before manifests are read: a commit under way is safe. Signatures are not asked for: what an
    unsigned object refers to is kept, too. VersionNotFoundError, and nothing to collect, where a ref or the horizon
    stands for a version that nothing leads to: verify such a chain first. StorageError, likewise, while a version, a
    shortcut or a ref is won and not yet published.
    """
    chain = Chain(chain.store)
    objects = tuple(info for prefix in _COLLECTED for info in chain.store.list(prefix))
    staging_prefix = chain.store.staging_prefix
    staged = tuple(chain.store.list(staging_prefix)) if staging_prefix else ()
    _require_published(chain)  # before manifests are read: what was published meanwhile is among them
    manifests = chain.manifests()
    ways = Ways(chain)
    shortcuts = tuple(s for m in manifests for s in ways.shortcuts_into(m.version))
    kept = read_kept(chain, manifests, current_refs(chain).values(), now)
    for error in kept.unreachable.values():
        raise error
    return GcView(objects, manifests, shortcuts, kept, staged)


def _require_published(chain: Chain) -> None:
    """Whoever writes the key next publishes what its winner wrote, however old: that must find its objects."""
    pending = [c.key for c in chain.store.contests() if c.kind == "unpublished" and c.key.startswith(_LEADING)]
    if pending:
        raise StorageError(
            f"{chain.url} has keys that a writer won and never published ({', '.join(pending)}): nothing can be "
            "collected, since what they need cannot be told. `weightline verify` says of each how to finish it",
            keys=pending, url=chain.url,
        )  # fmt: skip


def collect(chain: Chain, plan: GcPlan) -> None:
    """Delete what was planned. Safe to repeat; a crash leaves the rest for the next time."""
    for info in plan.objects:
        if not _is_put_again(chain, info):
            chain.store.delete(info.key)


def _is_put_again(chain: Chain, info: ObjectInfo) -> bool:
    """An asset's key names its content: a commit under way may have put it since the plan was made."""
    found = chain.store.head(info.key) if info.key.startswith(keys.ASSETS) else None
    return found is not None and found.modified_at - info.modified_at > _CLOCK_GRAIN
