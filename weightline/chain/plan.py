"""Which objects a reader fetches to get from the version that it has to the one that it wants. Pure."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from weightline.errors import VersionNotFoundError
from weightline.format.manifest import Manifest, PayloadRef


@dataclass(frozen=True, slots=True)
class Hop:
    """One move between states: `base_version` is None where the payloads hold the full state."""

    base_version: int | None
    version: int
    payloads: tuple[PayloadRef, ...]

    @property
    def payload_nbytes(self) -> int:
        return sum(payload.nbytes for payload in self.payloads)


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


def plan_replay(manifests: Sequence[Manifest], have: int | None, want: int) -> ReplayPlan:
    """The cheapest way (bytes, then number of hops) from state `have` (None: nothing) to version `want`.

    Shortest path over the hops that the chain offers. VersionNotFoundError when no way leads there.
    """
    leaving: dict[int | None, list[Hop]] = defaultdict(list)
    for manifest in manifests:
        leaving[manifest.base_version].append(Hop(manifest.base_version, manifest.version, manifest.payloads))
    # An anchor can be read from any state: it leaves from `have` as well as from nothing.
    if have is not None:
        leaving[have] += leaving[None]
    return ReplayPlan(have, want, _shortest_path(leaving, have, want))


def _shortest_path(leaving: dict[int | None, list[Hop]], have: int | None, want: int) -> tuple[Hop, ...]:
    """Dijkstra on (bytes, hops)."""
    queue: list[tuple[int, int, int, int | None]] = [(0, 0, 0, have)]
    arrived_by: dict[int | None, Hop | None] = {}
    best: dict[int | None, tuple[int, int]] = {have: (0, 0)}
    came_by: dict[int | None, Hop | None] = {have: None}
    ticket = 0
    while queue:
        nbytes, count, _, state = heapq.heappop(queue)
        if state in arrived_by:
            continue
        arrived_by[state] = came_by[state]
        if state == want:
            break
        for hop in leaving.get(state, ()):
            cost = (nbytes + hop.payload_nbytes, count + 1)
            if hop.version not in arrived_by and cost < best.get(hop.version, (1 << 127, 0)):
                ticket += 1
                best[hop.version], came_by[hop.version] = cost, hop
                heapq.heappush(queue, (*cost, ticket, hop.version))
    if want not in arrived_by:
        raise VersionNotFoundError(f"no way leads from {have} to version {want}: it is not in the chain", version=want)
    return _walk_back(arrived_by, have, want)


def _walk_back(arrived_by: dict[int | None, Hop | None], have: int | None, want: int) -> tuple[Hop, ...]:
    path: list[Hop] = []
    state: int | None = want
    while state != have and (hop := arrived_by[state]) is not None:
        path.append(hop)
        # An anchor ends the walk back: whatever was before it does not matter.
        if hop.base_version is None:
            break
        state = hop.base_version
    return tuple(reversed(path))
