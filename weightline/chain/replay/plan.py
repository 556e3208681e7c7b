"""Plans the cheapest path from the version that a reader has to the one that it wants.

`plan_replay` is pure. `Ways` lists the hops that a bucket offers: each version's own payloads, shortcuts, and deltas
that are applied backwards.
"""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import oldest_kept
from weightline.errors import (
    CorruptError,
    ManifestError,
    NotFoundError,
    StorageError,
    TransientStorageError,
    UnsupportedFeatureError,
    VersionNotFoundError,
    WeightlineError,
)
from weightline.format import keys
from weightline.format.manifest import Header, PayloadRef
from weightline.format.shortcut import Shortcut

_logger = logging.getLogger(__name__)

#: Versions whose shortcuts are listed first.
_FIRST_BLOCK = 64

#: Codings whose positions can be decoded without the base, so that a delta can be applied backwards.
REVERSIBLE_CODINGS = frozenset({"gap"})


@dataclass(frozen=True, slots=True)
class Hop:
    """One step between two versions. `base_version` is None when the payloads hold the full state."""

    base_version: int | None
    version: int
    payloads: tuple[PayloadRef, ...]
    num_changed: int = 0
    is_backward: bool = False
    """True for a step from `version` to `base_version`, which only `REVERSIBLE_CODINGS` allow."""
    is_shortcut: bool = False
    base_commit_id: str | None = None
    """Of a shortcut from a version: the commit that it starts from."""

    @property
    def shortcut_key(self) -> str | None:
        """Returns the key of the shortcut; None for a version's own payloads."""
        return keys.shortcut(self.base_version, self.version) if self.is_shortcut else None

    @property
    def payload_nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)

    @property
    def start(self) -> int | None:
        """Returns the version that the reader must have before the hop; None for a full state."""
        return self.version if self.is_backward else self.base_version

    @property
    def target(self) -> int | None:
        """Returns the version that the reader has after the hop."""
        return self.base_version if self.is_backward else self.version


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """The hops from `have` to `want`, in order. Empty when the reader has the wanted version already."""

    have: int | None
    want: int
    hops: tuple[Hop, ...]

    @property
    def payload_nbytes(self) -> int:
        return sum(hop.payload_nbytes for hop in self.hops)

    @property
    def num_objects(self) -> int:
        return sum(len(hop.payloads) for hop in self.hops)


WaysInto = Callable[[int], Iterable[Hop]]
Stands = Callable[[Hop], bool]


def plan_replay(ways_into: WaysInto, have: int | None, want: int, stands: Stands = lambda _: True) -> ReplayPlan:
    """Returns the cheapest path (by bytes, then hops) from `have` (None: nothing) to `want`.

    VersionNotFoundError when there is no path. This is Dijkstra's algorithm from the wanted version backwards, so that
    only headers near the path are read. `ways_into(version)` yields the hops whose target is that version, and
    nothing for a version that is not in the chain. `stands(hop)` says whether the hop's base is the chain's; it is
    called only for hops that are the cheapest ones.
    """
    queue: list[tuple[int, int, int, int, Hop | None]] = [(0, 0, 0, want, None)]
    next_hop: dict[int, Hop | None] = {}
    entry: tuple[tuple[int, int], Hop] | None = None
    ticket = 0
    while queue and have not in next_hop:
        nbytes, count, _, version, leaving = heapq.heappop(queue)
        if version in next_hop:
            continue
        if entry is not None and entry[0] < (nbytes, count):
            break
        if leaving is not None and not stands(leaving):
            continue
        next_hop[version] = leaving
        if version == have:
            break
        for hop in ways_into(version):
            cost = (nbytes + hop.payload_nbytes, count + 1)
            if hop.start is None:
                entry = min(entry or (cost, hop), (cost, hop), key=lambda found: found[0])
            elif hop.start not in next_hop:
                ticket += 1
                heapq.heappush(queue, (*cost, ticket, hop.start, hop))
    if have is not None and have in next_hop:
        return ReplayPlan(have, want, tuple(_follow(next_hop, have, want)))
    if entry is None:
        raise VersionNotFoundError(f"version {want} cannot be replayed: its anchor is gone", version=want)
    first = entry[1]
    return ReplayPlan(have, want, (first, *_follow(next_hop, first.version, want)))


def _follow(next_hop: Mapping[int, Hop | None], start: int, want: int) -> Iterable[Hop]:
    at = start
    while at != want:
        hop = next_hop[at]
        assert hop is not None
        yield hop
        assert hop.target is not None
        at = hop.target


class Planner(Protocol):
    """Plans paths between versions."""

    def plan(self, have: int | None, want: int) -> ReplayPlan:
        """Returns the path from `have` (None: nothing) to `want`. VersionNotFoundError when there is none."""
        ...


class Ways:
    """Lists the hops into a version. Each object is read once, on demand.

    A shortcut that cannot be used is passed over: every version can be reached without shortcuts.
    """

    def __init__(
        self,
        chain: Chain,
        *,
        first: int = 0,
        last: int | None = None,
        first_base: int = 0,
        backward_below: int | None = None,
        avoiding: Collection[str] = (),
        anchored_at: int | None = None,
        listed: ShortcutKeys | None = None,
    ) -> None:
        """Offers the shortcuts into versions first..last, but those from a base before `first_base`.

        With `last`, keys are listed from there backwards, as far as they are asked for; without it, all at once.

        `backward_below`: also offer deltas applied backwards, into versions below this one. `avoiding`: keys of
        shortcuts that are known to be broken. `anchored_at`: a version that paths start at, by its anchor; nothing
        before it is read. `listed`: the keys of versions 0..last, if another object has begun to list them.
        """
        self._chain = chain
        self.horizon = oldest_kept(chain)
        self._backward_below = backward_below
        self._anchored_at = anchored_at
        self.passed_over: dict[str, WeightlineError] = {}
        """Shortcuts that cannot be used, with the error, by key."""
        self._shortcuts: dict[str, Shortcut] = {}
        self._keys = listed or ShortcutKeys(chain, first, last)
        self._first_base, self._avoiding = first_base, avoiding
        self._plans: dict[tuple[int | None, int], ReplayPlan] = {}

    def plan(self, have: int | None, want: int) -> ReplayPlan:
        """Returns the cheapest path, which is planned once. VersionNotFoundError when there is none."""
        if (have, want) not in self._plans:
            self._plans[have, want] = plan_replay(self, have, want, self.stands)
        return self._plans[have, want]

    def __call__(self, version: int) -> Iterator[Hop]:
        """Yields the hops into a version, without a look at the bases of shortcuts: see `stands`."""
        if self._is_gone(version):
            return
        try:
            header = self._chain.header(version)
        except VersionNotFoundError:
            return  # collected since the horizon was read
        is_start = version == self._anchored_at
        if header.base_version is None or not is_start:
            yield hop_of(header)
        for shortcut in self.shortcuts_into(version):
            if shortcut.commit_id == header.commit_id and (shortcut.base_version is None or not is_start):
                yield hop_of_shortcut(shortcut)
        if self._backward_below is not None and version < self._backward_below and not self._is_gone(version + 1):
            above = self._chain.header(version + 1)
            if above.base_version == version and above.coding in REVERSIBLE_CODINGS:
                yield Hop(version, above.version, above.payloads, above.num_changed, is_backward=True)

    def shortcuts_into(self, version: int) -> Iterator[Shortcut]:
        """Yields the version's shortcuts, but those in `passed_over` and those that are gone by now."""
        for key in self._keys.into(version):
            base, _ = keys.ends_of_shortcut(key) or (None, 0)
            is_offered = key not in self._avoiding and (base is None or base >= self._first_base)
            if is_offered and (shortcut := self.shortcut(key)) is not None:
                yield shortcut

    def shortcut(self, key: str) -> Shortcut | None:
        """Returns the shortcut; None for one that is gone by now, and for one that cannot be used: `passed_over`."""
        if key not in self._shortcuts and key not in self.passed_over:
            try:
                self._shortcuts[key] = read_shortcut(self._chain, key)
            except TransientStorageError:
                raise
            except NotFoundError:
                return None
            except (CorruptError, UnsupportedFeatureError, StorageError) as error:
                self.passed_over[key] = error
                _logger.warning("the shortcut %s of %s is passed over: %s", key, self._chain.url, error)
        return self._shortcuts.get(key)

    def stands(self, hop: Hop) -> bool:
        """Returns whether the base of a shortcut is still in the chain. Without it the shortcut cannot be used."""
        if not hop.is_shortcut or hop.base_version is None:
            return True
        if self._is_gone(hop.base_version):
            return False
        try:
            return self._chain.header(hop.base_version).commit_id == hop.base_commit_id
        except VersionNotFoundError:
            return False

    def _is_gone(self, version: int) -> bool:
        """Returns whether a version was collected. gc deletes headers before payloads, so the header decides.

        Behind the horizon the bucket is read and not the cache of headers, since gc may have run.
        """
        return version < self.horizon and self._chain.store.head(keys.commit(version)) is None


class ShortcutKeys:
    """The keys of the shortcuts into versions first..last, by version.

    They are listed from `last` backwards in blocks, each eight times as large as the one before, so that a reader near
    the tip of a long chain lists few. Without `last` they are listed at once.
    """

    def __init__(self, chain: Chain, first: int, last: int | None) -> None:
        self._chain = chain
        self._first = first
        self._keys: dict[int, list[str]] = defaultdict(list)
        self._listed_from = first if last is None else last + 1
        self._num_versions = _FIRST_BLOCK
        if last is None:
            self._list(first, None)

    def into(self, version: int) -> Sequence[str]:
        while self._first <= version < self._listed_from:
            self._list_block()
        return self._keys.get(version, ())

    def bases_of(self, version: int) -> list[int | None]:
        """Returns the bases of the shortcuts into a version; None for an anchor."""
        ends = (keys.ends_of_shortcut(key) for key in self.into(version))
        return [one[0] for one in ends if one is not None]

    def newest_anchor(self, avoiding: Collection[str]) -> int | None:
        """Returns the newest version that an anchor's shortcut leads to; None without one."""
        return self._newest(lambda key: _is_anchor(key) and key not in avoiding)

    def newest_target(self) -> int | None:
        """Returns the newest version that a shortcut from another version leads to; None without one."""
        return self._newest(lambda key: not _is_anchor(key))

    def _newest(self, counts: Callable[[str], bool]) -> int | None:
        while True:
            found = [version for version, listed in self._keys.items() if any(map(counts, listed))]
            if found or self._listed_from <= self._first:
                return max(found, default=None)
            self._list_block()

    def _list_block(self) -> None:
        start = max(self._first, self._listed_from - self._num_versions)
        self._list(start, self._listed_from - 1)
        self._listed_from, self._num_versions = start, 8 * self._num_versions

    def _list(self, first: int, last: int | None) -> None:
        for info in self._chain.store.list(keys.SHORTCUTS, f"{keys.SHORTCUTS}{keys.padded(first)}"):
            if ends := keys.ends_of_shortcut(info.key):
                if last is not None and ends[1] > last:
                    return
                self._keys[ends[1]].append(info.key)


def _is_anchor(key: str) -> bool:
    return (keys.ends_of_shortcut(key) or (0, 0))[0] is None


def read_shortcut(chain: Chain, key: str) -> Shortcut:
    """Returns the shortcut under a key. NotFoundError; ManifestError, or SignatureError when keys are trusted."""
    shortcut = Shortcut.from_bytes(chain.get_trusted(key))
    if shortcut.key != key:
        raise ManifestError(f"{key} holds the shortcut {shortcut.key}", rule="shortcut-is-key")
    return shortcut


def hop_of(header: Header) -> Hop:
    """Returns the version's own payloads as a hop."""
    return Hop(header.base_version, header.version, header.payloads, header.num_changed)


def hop_of_shortcut(shortcut: Shortcut) -> Hop:
    """Returns the shortcut as a hop."""
    return Hop(
        shortcut.base_version, shortcut.version, shortcut.payloads, shortcut.num_changed, is_shortcut=True,
        base_commit_id=shortcut.base_commit_id,
    )  # fmt: skip


class Routes:
    """Plans paths as `plan_between` does, each once: for a verb that moves many groups of tensors along one path."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._plans: dict[tuple[int | None, int], ReplayPlan] = {}

    def plan(self, have: int | None, want: int) -> ReplayPlan:
        """Returns the cheapest path. VersionNotFoundError when there is none."""
        if (have, want) not in self._plans:
            self._plans[have, want] = plan_between(self._chain, have, want)
        return self._plans[have, want]


def plan_between(
    chain: Chain, have: int | None, want: int, avoiding: Collection[str] = (), *, is_next_direct: bool = True
) -> ReplayPlan:
    """Returns the cheapest path in the bucket's present state. Reads headers near the path, and no payload.

    A reader that can move forward from what it has does so: shortcuts from before that version are not read. One that
    has nothing starts at the newest anchor before the wanted version, and nothing before that anchor is read. One that
    is a step behind takes the version's own delta without a look at shortcuts, unless `is_next_direct` is false.
    `avoiding`: keys of shortcuts that are known to be broken.
    """
    header = chain.header(want)
    if is_next_direct and have is not None and have + 1 == want and header.base_version == have:
        return ReplayPlan(have, want, (hop_of(header),))
    for ways in _ways_between(chain, have, want, avoiding):
        try:
            return ways.plan(have, want)
        except VersionNotFoundError as error:
            failed, horizon = error, ways.horizon
    if oldest_kept(chain) == horizon:
        raise failed
    # History was collected while it was read: its new first version has an anchor.
    *_, ways = _ways_between(chain, have, want, avoiding)
    return ways.plan(have, want)


def _ways_between(chain: Chain, have: int | None, want: int, avoiding: Collection[str]) -> Iterator[Ways]:
    """Yields what to plan with: the hops that a path most likely has, and, when there is no such path, all hops."""
    if have is not None and have <= want:
        yield Ways(chain, first=have + 1, last=want, first_base=have, avoiding=avoiding)
    last = max(want, have or 0)
    listed = ShortcutKeys(chain, 0, last)
    anchor = listed.newest_anchor(avoiding) if have is None else None
    if anchor is not None:
        yield Ways(chain, last=want, first_base=anchor, avoiding=avoiding, anchored_at=anchor, listed=listed)
    below = have if have is not None and have > want else None
    yield Ways(chain, last=last, backward_below=below, avoiding=avoiding, listed=listed)
