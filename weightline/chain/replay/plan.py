"""Which objects a reader fetches to get from the version that it has to the one that it wants. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from weightline.errors import VersionNotFoundError
from weightline.format.manifest import PayloadRef


@dataclass(frozen=True, slots=True)
class Hop:
    """One move between states. `base_version` is None where the payloads hold the full state."""

    base_version: int | None
    version: int
    payloads: tuple[PayloadRef, ...]
    num_changed: int = 0
    is_backward: bool = False
    """Walked from `version` to `base_version`: only a coding that is blind to the base allows it."""
    is_shortcut: bool = False

    @property
    def payload_nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)

    @property
    def start(self) -> int | None:
        """Where the reader stands before the hop; None: anywhere."""
        return self.version if self.is_backward else self.base_version

    @property
    def target(self) -> int | None:
        """Where the reader stands after the hop."""
        return self.base_version if self.is_backward else self.version


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """Hops in order. Empty when the reader is there already."""

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
    """The cheapest way (bytes, then hops) from `have` (None: nothing) to `want`. VersionNotFoundError: there is none.

    Dijkstra from the wanted version backwards, so that only manifests near the way are read. `ways_into(version)` gives
    the hops whose target is that version, and raises VersionNotFoundError for one that is not in the chain.
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
        raise VersionNotFoundError(f"no way leads to version {want}: its anchor is gone", version=want)
    first = entry[1]
    return ReplayPlan(have, want, (first, *_follow(next_hop, first.version, want)))


def _follow(next_hop: dict[int, Hop], start: int, want: int) -> Iterable[Hop]:
    at = start
    while at != want:
        hop = next_hop[at]
        yield hop
        assert hop.target is not None
        at = hop.target
