"""Plans the cheapest path from the version that a reader has to the one that it wants.

`plan_replay` is pure. `Ways` lists the hops that a bucket offers: each version's own payloads, shortcuts, and deltas
that are applied backwards.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import oldest_kept
from weightline.errors import ManifestError, NotFoundError, SignatureError, VersionNotFoundError
from weightline.format import keys
from weightline.format.manifest import Manifest, PayloadRef
from weightline.format.shortcut import Shortcut

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


def plan_replay(ways_into: WaysInto, have: int | None, want: int) -> ReplayPlan:
    """Returns the cheapest path (by bytes, then hops) from `have` (None: nothing) to `want`.

    VersionNotFoundError when there is no path. This is Dijkstra's algorithm from the wanted version backwards, so that
    only manifests near the path are read. `ways_into(version)` yields the hops whose target is that version, and raises
    VersionNotFoundError for one that is not in the chain.
    """
    queue: list[tuple[int, int, int, int]] = [(0, 0, 0, want)]
    best: dict[int, tuple[int, int]] = {want: (0, 0)}
    next_hop: dict[int, Hop] = {}
    entry: tuple[tuple[int, int], Hop] | None = None
    done: set[int] = set()
    ticket = 0
    while queue:
        nbytes, count, _, version = heapq.heappop(queue)
        if version in done:
            continue
        if version == have or (entry is not None and entry[0] <= (nbytes, count)):
            break
        done.add(version)
        for hop in ways_into(version):
            cost = (nbytes + hop.payload_nbytes, count + 1)
            if hop.start is None:
                entry = min(entry or (cost, hop), (cost, hop), key=lambda found: found[0])
            elif cost < best.get(hop.start, (1 << 127, 0)):
                ticket += 1
                best[hop.start], next_hop[hop.start] = cost, hop
                heapq.heappush(queue, (*cost, ticket, hop.start))
    from_have = best.get(have) if have is not None else None
    if from_have is not None and (entry is None or from_have <= entry[0]):
        assert have is not None
        return ReplayPlan(have, want, tuple(_follow(next_hop, have, want)))
    if entry is None:
        raise VersionNotFoundError(f"version {want} cannot be replayed: its anchor is gone", version=want)
    first = entry[1]
    return ReplayPlan(have, want, (first, *_follow(next_hop, first.version, want)))


def _follow(next_hop: dict[int, Hop], start: int, want: int) -> Iterable[Hop]:
    at = start
    while at != want:
        hop = next_hop[at]
        yield hop
        assert hop.target is not None
        at = hop.target


class Ways:
    """Lists the hops into a version. Shortcuts are listed once, when this is made; manifests are read on demand."""

    def __init__(self, chain: Chain, *, backward_below: int | None = None) -> None:
        """Lists the shortcuts. `backward_below`: also offer deltas applied backwards, into versions below this one."""
        self._chain = chain
        self._horizon = oldest_kept(chain)
        self._backward_below = backward_below
        self.refused: dict[str, SignatureError] = {}
        """Shortcuts that were skipped because no trusted key signed them, with the error, by key."""
        self._shortcut_keys: dict[int, list[str]] = defaultdict(list)
        for info in chain.store.list(keys.SHORTCUTS):
            if ends := keys.ends_of_shortcut(info.key):
                self._shortcut_keys[ends[1]].append(info.key)

    def __call__(self, version: int) -> Iterator[Hop]:
        if self._is_gone(version):
            return
        manifest = self._chain.manifest(version)
        yield hop_of(manifest)
        for shortcut in self.shortcuts_into(version):
            if shortcut.commit_id == manifest.commit_id and self._base_stands(shortcut):
                yield hop_of_shortcut(shortcut)
        if self._backward_below is not None and version < self._backward_below and not self._is_gone(version + 1):
            above = self._chain.manifest(version + 1)
            if above.base_version == version and above.coding in REVERSIBLE_CODINGS:
                yield Hop(version, above.version, above.payloads, above.num_changed, is_backward=True)

    def shortcuts_into(self, version: int) -> Iterator[Shortcut]:
        """Yields the version's shortcuts, except those that are gone by now or that no trusted key signed."""
        for key in self._shortcut_keys.get(version, ()):
            try:
                shortcut = Shortcut.from_bytes(self._chain.get_trusted(key))
            except NotFoundError:
                continue
            except SignatureError as error:
                self.refused[key] = error
                continue
            if shortcut.key != key:
                raise ManifestError(f"{key} holds the shortcut {shortcut.key}", rule="shortcut-is-key")
            yield shortcut

    def _is_gone(self, version: int) -> bool:
        """Returns whether a version was collected. gc deletes manifests before payloads, so the manifest decides.

        Behind the horizon the bucket is read and not the cache of manifests, since gc may have run.
        """
        return version < self._horizon and self._chain.store.head(keys.commit(version)) is None

    def _base_stands(self, shortcut: Shortcut) -> bool:
        """Returns whether the shortcut's base is still in the chain. Without it the shortcut cannot be used."""
        if shortcut.base_version is None:
            return True
        if self._is_gone(shortcut.base_version):
            return False
        return self._chain.manifest(shortcut.base_version).commit_id == shortcut.base_commit_id


def hop_of(manifest: Manifest) -> Hop:
    """Returns the version's own payloads as a hop."""
    return Hop(manifest.base_version, manifest.version, manifest.payloads, manifest.num_changed)


def hop_of_shortcut(shortcut: Shortcut) -> Hop:
    """Returns the shortcut as a hop."""
    return Hop(
        shortcut.base_version, shortcut.version, shortcut.payloads, shortcut.num_changed, is_shortcut=True
    )  # fmt: skip


def plan_between(chain: Chain, have: int | None, want: int) -> ReplayPlan:
    """Returns the cheapest path in the bucket's present state. Reads manifests near the path, and no payload."""
    chain.manifest(want)
    ways = Ways(chain, backward_below=have if have is not None and have > want else None)
    return plan_replay(ways, have, want)
