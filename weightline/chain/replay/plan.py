"""Plans the cheapest path from the version that a reader has to the one that it wants.

`plan_replay` is pure. `Ways` lists the hops that a bucket offers: each version's own payloads, shortcuts, and deltas
that are applied backwards.
"""

from __future__ import annotations

import heapq
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

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


class Ways:
    """Lists the hops into a version. Keys are listed once, when this is made; each object is read once, on demand.

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
    ) -> None:
        """Lists the shortcuts into versions first..last, but those from a base before `first_base`.

        `backward_below`: also offer deltas applied backwards, into versions below this one. `avoiding`: keys of
        shortcuts that are known to be broken.
        """
        self._chain = chain
        self._horizon = oldest_kept(chain)
        self._backward_below = backward_below
        self.passed_over: dict[str, WeightlineError] = {}
        """Shortcuts that cannot be used, with the error, by key."""
        self._shortcuts: dict[str, Shortcut] = {}
        self._keys: dict[int, list[str]] = defaultdict(list)
        for key in _shortcut_keys(chain, first, last):
            base, version = keys.ends_of_shortcut(key) or (None, 0)
            if key not in avoiding and (base is None or base >= first_base):
                self._keys[version].append(key)

    def __call__(self, version: int) -> Iterator[Hop]:
        """Yields the hops into a version, without a look at the bases of shortcuts: see `stands`."""
        if self._is_gone(version):
            return
        try:
            header = self._chain.header(version)
        except VersionNotFoundError:
            return  # collected since the horizon was read
        yield hop_of(header)
        for shortcut in self.shortcuts_into(version):
            if shortcut.commit_id == header.commit_id:
                yield hop_of_shortcut(shortcut)
        if self._backward_below is not None and version < self._backward_below and not self._is_gone(version + 1):
            above = self._chain.header(version + 1)
            if above.base_version == version and above.coding in REVERSIBLE_CODINGS:
                yield Hop(version, above.version, above.payloads, above.num_changed, is_backward=True)

    def shortcuts_into(self, version: int) -> Iterator[Shortcut]:
        """Yields the version's shortcuts, but those in `passed_over` and those that are gone by now."""
        for key in self._keys.get(version, ()):
            if key not in self._shortcuts and key not in self.passed_over:
                try:
                    self._shortcuts[key] = read_shortcut(self._chain, key)
                except TransientStorageError:
                    raise
                except NotFoundError:
                    continue
                except (CorruptError, UnsupportedFeatureError, StorageError) as error:
                    self.passed_over[key] = error
                    _logger.warning("the shortcut %s of %s is passed over: %s", key, self._chain.url, error)
            if key in self._shortcuts:
                yield self._shortcuts[key]

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
        return version < self._horizon and self._chain.store.head(keys.commit(version)) is None


def _shortcut_keys(chain: Chain, first: int, last: int | None) -> Iterator[str]:
    for info in chain.store.list(keys.SHORTCUTS, f"{keys.SHORTCUTS}{keys.padded(first)}"):
        if ends := keys.ends_of_shortcut(info.key):
            if last is not None and ends[1] > last:
                return
            yield info.key


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


def plan_between(chain: Chain, have: int | None, want: int, avoiding: Collection[str] = ()) -> ReplayPlan:
    """Returns the cheapest path in the bucket's present state. Reads headers near the path, and no payload.

    A reader that can move forward from what it has does so: shortcuts from before that version are not read.
    `avoiding`: keys of shortcuts that are known to be broken.
    """
    chain.header(want)
    horizon = oldest_kept(chain)
    try:
        return _plan(chain, have, want, avoiding)
    except VersionNotFoundError:
        if oldest_kept(chain) == horizon:
            raise
    # History was collected while it was read: its new first version has an anchor.
    return _plan(chain, have, want, avoiding)


def direct_plan(chain: Chain, have: int | None, want: int) -> ReplayPlan | None:
    """Returns the path by the version's own delta, when it leads there from what the reader has; None otherwise.

    A reader that is one step behind takes it without a look at shortcuts: it costs no listing.
    """
    header = chain.header(want)
    is_next = have is not None and want == have + 1 and header.base_version == have
    return ReplayPlan(have, want, (hop_of(header),)) if is_next else None


def _plan(chain: Chain, have: int | None, want: int, avoiding: Collection[str]) -> ReplayPlan:
    if have is not None and have <= want:
        ways = Ways(chain, first=have + 1, last=want, first_base=have, avoiding=avoiding)
        with suppress(VersionNotFoundError):
            return plan_replay(ways, have, want, ways.stands)
    below = have if have is not None and have > want else None
    ways = Ways(chain, last=max(want, have or 0), backward_below=below, avoiding=avoiding)
    return plan_replay(ways, have, want, ways.stands)
