"""Garbage collection: deletes objects that no kept version needs. A pure function plans; `collect` deletes.

Never collected: objects that a kept version needs, versions that a ref or a live replica's lease names, and any object
younger than the grace period, since a commit under way has payloads that no header names yet. Ages are by the store's
clock, which is read from an object that this writes; a plan that is only shown writes nothing, and takes `host_clock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import current_refs, oldest_kept, require_horizon
from weightline.chain.replay.plan import Ways
from weightline.chain.upkeep.retention import Kept, names_of, pinned_versions, read_kept
from weightline.errors import CorruptError, InputError, StorageError, VersionNotFoundError
from weightline.format import keys
from weightline.format.manifest import Header, StoredObject
from weightline.format.shortcut import Shortcut
from weightline.store import ObjectInfo, Store
from weightline.store.base import read_clock

#: Returns the present time by a store's clock.
Clock = Callable[[Store], datetime]

DEFAULT_GRACE = timedelta(hours=24)
#: A hundred years.
_MAX_GRACE_HOURS = 876_000
#: Objects deleted by one call: S3 takes a thousand in one request.
_BATCH_SIZE = 1000
#: Some stores report whole seconds in one reply and fractions in another.
_CLOCK_GRAIN = timedelta(seconds=1)
_COLLECTED = (
    keys.PAYLOADS, *keys.SHARED, keys.SHORTCUTS, keys.COMMITS, keys.SIGNATURES, keys.PROBES, keys.LEASES,
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
    """Small files, and lists of them."""
    shared: tuple[ObjectInfo, ...]
    """Layouts, lists of digests and provenances."""
    probes: tuple[ObjectInfo, ...]
    leases: tuple[ObjectInfo, ...]
    """Leases of replicas that are gone."""
    staged: tuple[ObjectInfo, ...]
    """Temporary files that killed writers left in a bucket that is a local folder."""

    grace: timedelta
    now: datetime
    """The time of the clock when the plan was made."""
    horizon: int
    pinned: frozenset[int]
    """The versions that refs and leases named then."""

    @property
    def groups(self) -> tuple[tuple[ObjectInfo, ...], ...]:
        """Returns the objects in the order of deletion. Objects that others may refer to come last."""
        return (
            self.shortcuts, self.manifests, self.signatures, self.payloads, self.assets, self.shared, self.probes,
            self.leases, self.staged,
        )  # fmt: skip

    @property
    def objects(self) -> tuple[ObjectInfo, ...]:
        return tuple(info for group in self.groups for info in group)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.objects)


@dataclass(frozen=True, slots=True)
class GcView:
    """The objects of the bucket and the versions that are kept: the input of `plan_gc`."""

    objects: tuple[ObjectInfo, ...]
    headers: Mapping[int, frozenset[str]]
    """By version, the keys of all objects that its header names."""
    shortcuts: tuple[Shortcut, ...]
    kept: Kept
    now: datetime
    """The time of the clock."""
    horizon: int
    pinned: frozenset[int]
    """The versions that refs and live leases name."""
    staged: tuple[ObjectInfo, ...] = ()
    """The objects below the store's staging prefix."""


def plan_gc(view: GcView, *, grace: timedelta = DEFAULT_GRACE) -> GcPlan:
    """Returns the objects to delete: those that nothing kept names, and that are older than `grace`. Pure."""
    kept_shortcuts = [s for s in view.shortcuts if view.kept.keeps_shortcut(s)]
    needed = {ref.key for s in kept_shortcuts for ref in s.payloads} | {s.key for s in kept_shortcuts}
    for version, named in view.headers.items():
        if version in view.kept.versions:
            needed |= named | {keys.commit(version)}
    old = [info for info in view.objects if info.key not in needed and view.now - info.modified_at >= grace]

    def under(prefix: str) -> tuple[ObjectInfo, ...]:
        return tuple(info for info in old if info.key.startswith(prefix))

    return GcPlan(
        payloads=under(keys.PAYLOADS),
        manifests=under(keys.COMMITS),
        shortcuts=under(keys.SHORTCUTS),
        signatures=tuple(s for s in under(keys.SIGNATURES) if keys.subject_of_signature(s.key) not in needed),
        assets=under(keys.ASSETS),
        shared=tuple(info for prefix in (keys.LAYOUTS, keys.DIGESTS, keys.PROVENANCE) for info in under(prefix)),
        probes=under(keys.PROBES),
        leases=tuple(info for info in under(keys.LEASES) if info.key not in view.kept.live_leases),
        staged=tuple(info for info in view.staged if view.now - info.modified_at >= grace),
        grace=grace, now=view.now, horizon=view.horizon, pinned=view.pinned,
    )  # fmt: skip


def host_clock(_: Store) -> datetime:
    """Returns the present time by this host's clock: for a plan that is shown and not collected."""
    return datetime.now(UTC)


def view_chain(chain: Chain, clock: Clock = read_clock) -> GcView:
    """Reads the input of `plan_gc`, at the time of the store's clock: the host's may be wrong by any amount.

    Objects are listed before headers are read, so a commit under way is safe. Signatures are not checked: objects that
    an unsigned header names are kept, too. Nothing can be collected, and an error says why, when a ref or the
    horizon names a version that cannot be replayed (VersionNotFoundError), when the horizon is beyond the tip, a
    manifest is missing or a shortcut cannot be read (CorruptError), and while a version, a shortcut or a ref is won and
    not yet published (StorageError).
    """
    while True:
        horizon = oldest_kept(chain)
        try:
            return _view(Chain(chain.store), clock(chain.store), horizon)
        except VersionNotFoundError:
            if oldest_kept(chain) == horizon:
                raise  # else another process expired and collected history while this one read it


def _view(chain: Chain, now: datetime, horizon: int) -> GcView:
    objects = tuple(info for prefix in _COLLECTED for info in chain.store.list(prefix))
    staging_prefix = chain.store.staging_prefix
    staged = tuple(chain.store.list(staging_prefix)) if staging_prefix else ()
    _require_published(chain)  # before headers are read, so that those published meanwhile are among them
    headers = tuple(_headers(chain))
    _require_whole(chain, headers, horizon)
    shortcuts, ways = _shortcuts(chain, headers, {info.key: info for info in objects})
    pinned = pinned_versions(chain, now)
    kept = read_kept(chain, headers, current_refs(chain).values(), ways, horizon, now)
    for version, error in kept.unreachable.items():
        raise VersionNotFoundError(
            f"{chain.url}: {error}. A ref or the horizon names this version, so nothing is collected. `weightline "
            "repair` removes refs whose version is gone",
            chain=chain.url, version=version,
        )  # fmt: skip
    named = {h.version: frozenset(names_of(chain, h)) for h in headers if h.version in kept.versions}
    return GcView(objects, named, shortcuts, kept, now, horizon, pinned, staged)


def _headers(chain: Chain) -> Iterator[Header]:
    for version in chain.versions():
        with suppress(VersionNotFoundError):  # collected since it was listed; a kept one would be missed
            yield chain.header(version)


def _require_whole(chain: Chain, headers: Sequence[Header], horizon: int) -> None:
    """Raises CorruptError unless there is every version from the horizon to the tip."""
    kept = [header.version for header in headers if header.version >= horizon]
    require_horizon(chain, horizon, headers[-1].version if headers else None)
    for expected, version in enumerate(kept, horizon):
        if version != expected:
            raise CorruptError(
                f"{chain.url} has no version {expected}, but version {version}: nothing is collected. Restore "
                f"{keys.commit(expected)}, or remove what follows it",
                key=keys.commit(expected),
            )


def _shortcuts(
    chain: Chain, headers: Sequence[Header], listed: Mapping[str, ObjectInfo]
) -> tuple[tuple[Shortcut, ...], Ways]:
    """Returns all shortcuts, and the paths without those whose payloads are gone: nothing may be kept by them alone."""
    ways = Ways(chain)
    shortcuts = tuple(s for header in headers for s in ways.shortcuts_into(header.version))
    if ways.passed_over:
        key, error = next(iter(ways.passed_over.items()))
        if not isinstance(error, CorruptError):
            raise error  # of a newer release, or not readable from here
        raise CorruptError(
            f"{chain.url}: {error}. The objects that it keeps are unknown, so nothing is collected. Remove it with "
            "`weightline repair`",
            key=key,
        ) from error
    broken = {s.key for s in shortcuts if not all(_is_there(chain, ref, listed) for ref in s.payloads)}
    return shortcuts, Ways(chain, avoiding=broken) if broken else ways


def _is_there(chain: Chain, ref: StoredObject, listed: Mapping[str, ObjectInfo]) -> bool:
    found = listed.get(ref.key) or chain.store.head(ref.key)
    return found is not None and found.nbytes == ref.nbytes


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


def find_garbage(chain: Chain, grace_hours: float, *, will_delete: bool) -> GcPlan:
    """Returns the objects to delete that are older than the grace.

    Ages are by the store's clock where the objects are to be deleted, else by this host's. InputError for a grace that
    is no time.
    """
    if not 0 <= grace_hours <= _MAX_GRACE_HOURS:
        raise InputError(f"the grace is {grace_hours:g} hours: name 0 to {_MAX_GRACE_HOURS}", field="grace_hours")
    view = view_chain(chain, read_clock if will_delete else host_clock)
    return plan_gc(view, grace=timedelta(hours=grace_hours))


def collect(chain: Chain, plan: GcPlan, clock: Clock = read_clock) -> None:
    """Deletes the planned objects, in batches. Safe to repeat; a crash leaves the rest for the next run.

    Right before each batch, refs and leases are read again. When one of them names another version from before the
    horizon, all is planned anew, and only what both plans contain is deleted. VersionNotFoundError when that version is
    gone already.
    """
    pinned, allowed = plan.pinned, {info.key for info in plan.objects}
    for group in plan.groups:
        for start in range(0, len(group), _BATCH_SIZE):
            now_pinned = frozenset(v for v in pinned_versions(chain, plan.now) if v < plan.horizon)
            if not now_pinned <= pinned:
                replanned = plan_gc(view_chain(chain, clock), grace=plan.grace)
                pinned, allowed = replanned.pinned, allowed & {info.key for info in replanned.objects}
            batch = [info for info in group[start : start + _BATCH_SIZE] if info.key in allowed]
            again = _put_again(chain, batch)
            doomed = [info.key for info in batch if info.key not in again]
            if doomed:
                chain.store.delete(*doomed)


def _put_again(chain: Chain, batch: Sequence[ObjectInfo]) -> set[str]:
    """Returns the keys that a commit or a replica has put again since the plan was made: shared objects and leases.

    Lists them once more, which takes fewer requests than asking for each.
    """
    found: set[str] = set()
    for prefix in (*keys.SHARED, keys.LEASES):
        planned = {info.key: info for info in batch if info.key.startswith(prefix)}
        if not planned:
            continue
        last = max(planned)
        for info in chain.store.list(prefix, min(planned)[:-1]):
            if info.key > last:
                break
            if info.key in planned and info.modified_at - planned[info.key].modified_at > _CLOCK_GRAIN:
                found.add(info.key)
    return found
