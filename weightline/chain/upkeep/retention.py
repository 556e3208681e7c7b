"""Decides which versions a bucket must keep, and expires old history. SPEC "Collect".

Expiry moves a horizon and deletes nothing; gc deletes the versions behind the horizon. A version can be replayed only
if there is an anchor at or before it, so the horizon always has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from weightline.chain.read.history import Chain
from weightline.chain.read.leases import Lease, live_leases
from weightline.chain.read.refs import Ref, current_refs, move_horizon, oldest_kept, require_horizon
from weightline.chain.replay.plan import Hop, ReplayPlan, Ways, plan_replay
from weightline.chain.upkeep.compact import CompactionPlan, write_compaction
from weightline.codec.anchor import ANCHOR_CODING
from weightline.errors import CorruptError, VersionNotFoundError
from weightline.format import keys
from weightline.format.header import HeaderV2
from weightline.format.manifest import Header, HeaderV1
from weightline.format.shortcut import Shortcut


def first_of_newest(chain: Chain, num_versions: int) -> int:
    """Returns the oldest of the newest `num_versions` versions."""
    return max(0, chain.tip_header().version - num_versions + 1)


def expire_before(chain: Chain, version: int) -> int:
    """Moves the horizon to `version`: older history may be collected. Returns the horizon. Safe to repeat.

    Writes an anchor at `version` first when it has none. A crash in between leaves an additional anchor. CorruptError
    when its anchor is broken, since the history before it is then the only way to the version.
    """
    horizon = oldest_kept(chain)
    chain.header(version)
    require_horizon(chain, horizon, chain.tip_version())
    if version <= horizon:
        return horizon
    anchors = [hop for hop in Ways(chain, first=version, last=version)(version) if hop.base_version is None]
    if not anchors:
        write_compaction(chain, CompactionPlan(version, (), {}, writes_anchor=True), coding=ANCHOR_CODING)
    elif not any(_is_whole(chain, hop) for hop in anchors):
        raise CorruptError(
            f"the anchor of version {version} of {chain.url} is broken: remove it with `weightline repair` and repeat",
            key=anchors[0].shortcut_key,
        )
    move_horizon(chain, version)
    return version


def _is_whole(chain: Chain, hop: Hop) -> bool:
    """Returns whether the payloads of a hop are in the bucket, with the sizes that they should have."""
    found = [(chain.store.head(ref.key), ref) for ref in hop.payloads]
    return all(info is not None and info.nbytes == ref.nbytes for info, ref in found)


@dataclass(frozen=True, slots=True)
class Kept:
    """The versions and shortcuts that must stay, with all objects that they name."""

    versions: frozenset[int] = frozenset()
    """Versions from the horizon on, those that refs and leases name, those that their replay needs, and `bearers`."""
    bearers: frozenset[int] = frozenset()
    """Versions that stay for their assets alone. The objects that their replay needs may be gone."""
    on_the_way: frozenset[str] = frozenset()
    """Keys of the shortcuts that the replay of kept versions uses."""
    live_leases: frozenset[str] = frozenset()
    """Keys of the leases of replicas that are alive."""
    unreachable: Mapping[int, VersionNotFoundError] = field(default_factory=dict)
    """Versions that the horizon or a ref names and that cannot be replayed: the chain is broken."""

    def keeps_shortcut(self, shortcut: Shortcut) -> bool:
        """Returns whether a shortcut is kept: one between two kept versions stays, even if no current plan uses it."""
        if shortcut.key in self.on_the_way:
            return True
        return all(end in self.versions for end in (shortcut.base_version, shortcut.version) if end is not None)


def read_kept(
    chain: Chain,
    headers: Sequence[Header],
    refs: Iterable[Ref],
    ways: Ways,
    horizon: int,
    now: datetime | None = None,
) -> Kept:
    """Reads from the bucket which versions and shortcuts must stay.

    `headers`: all of the chain, oldest first. `horizon`: read before them. Leases that have expired by `now` keep
    nothing.
    """
    kept = {header.version for header in headers if header.version >= horizon}
    pinned = {ref.version for ref in refs} | ({horizon} if kept else set())
    leases = live_leases(chain, now)
    plans, unreachable = _plans_to(ways, pinned)
    # A replica may restart at a version that cannot be replayed any more: its lease keeps nothing then.
    plans += _plans_to(ways, leased_versions(chain, leases) - pinned)[0]
    hops = [hop for plan in plans for hop in plan.hops]
    kept |= {hop.version for hop in hops}
    bearers = frozenset(_bearers_of_assets(headers, kept)) - kept
    on_the_way = frozenset(hop.shortcut_key for hop in hops if hop.shortcut_key is not None)
    live = frozenset(keys.lease(lease.replica) for lease in leases)
    return Kept(bearers | kept, bearers, on_the_way, live, unreachable)


def _plans_to(ways: Ways, versions: Iterable[int]) -> tuple[list[ReplayPlan], dict[int, VersionNotFoundError]]:
    plans, unreachable = [], {}
    for version in sorted(versions):
        try:
            plans.append(plan_replay(ways, None, version, ways.stands))
        except VersionNotFoundError as error:
            unreachable[version] = error
    return plans, unreachable


def pinned_versions(chain: Chain, now: datetime) -> frozenset[int]:
    """Returns the versions that refs and live replicas' leases name at present."""
    refs = {ref.version for ref in current_refs(chain).values()}
    return frozenset(refs.union(*(lease.versions for lease in live_leases(chain, now))))


def _bearers_of_assets(headers: Iterable[Header], kept: set[int]) -> Iterable[int]:
    """Yields the versions whose assets kept versions of format 1 use.

    Such a version without assets of its own has those of the newest version before it that names any.
    """
    bearer: int | None = None
    for header in headers:
        bearer = header.version if isinstance(header, HeaderV2) or _names_assets(header) else bearer
        if header.version in kept and bearer is not None:
            yield bearer


def _names_assets(header: Header) -> bool:
    return isinstance(header, HeaderV1) and bool(header.assets)


def names_of(chain: Chain, header: Header) -> tuple[str, ...]:
    """Returns the keys of all objects that a header names, the assets of its list among them.

    Raises what reading the list raises: without it, the assets that must stay are unknown.
    """
    found = [ref.key for ref in header.payloads]
    if isinstance(header, HeaderV2):
        found += header.shared_keys
        found += [asset.key for asset in chain.contents.assets(header.assets)] if header.assets else []
    elif isinstance(header, HeaderV1):
        found += [asset.key for asset in header.assets]
    return tuple(found)


def leased_versions(chain: Chain, leases: Iterable[Lease]) -> set[int]:
    """Returns the committed versions that live replicas serve or move to."""
    committed = set(chain.versions())
    return {version for lease in leases for version in lease.versions if version in committed}
