"""Which shortcuts make catching up cheap. Pure: from what each way costs to which ways to add.

A reader at version a < tip should get to the tip by at most `SLACK` times the bytes of the one direct delta, and by at
most about 2 log2(distance) hops. Walking back from the tip, a direct shortcut a -> tip is added exactly where the best
way so far breaks one of the two. So the promise holds by construction, and every shortcut earns its bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightline.chain.replay.plan import Hop

#: Bytes of the planned way over bytes of the direct delta. Below the promised 1.3, for direct sizes are interpolated.
SLACK = 1.25


@dataclass(frozen=True, slots=True)
class AnchorPolicy:
    """When a full state is worth its bytes: when replaying deltas to the tip costs a late joiner more time than it.

    Rates are of one reader: bytes it downloads a second, and elements it decodes a second from deltas and anchors.
    """

    download_nbytes_per_second: float = 250e6
    delta_elements_per_second: float = 10e6
    anchor_elements_per_second: float = 120e6

    def replay_seconds(self, hops: Sequence[Hop], num_elements: int) -> float:
        """What the hops cost a late joiner."""
        return sum(self._hop_seconds(hop, num_elements) for hop in hops)

    def _hop_seconds(self, hop: Hop, num_elements: int) -> float:
        is_anchor = hop.base_version is None
        decode = num_elements / self.anchor_elements_per_second
        if not is_anchor:
            decode = hop.num_changed / self.delta_elements_per_second
        return hop.payload_nbytes / self.download_nbytes_per_second + decode

    def wants_anchor(self, hops: Sequence[Hop], num_elements: int) -> bool:
        """Whether the deltas of a late joiner's way cost more than its anchor, which a new anchor would replace."""
        anchor, deltas = hops[:1], hops[1:]
        return self.replay_seconds(deltas, num_elements) > self.replay_seconds(anchor, num_elements)


def max_hops(distance: int) -> int:
    """How many hops a reader that many versions behind should need at most."""
    return 2 * math.ceil(math.log2(distance + 1)) + 1


def sample_bases(first: int, tip: int, growth: float = 1.2) -> tuple[int, ...]:
    """Versions at distances 1, 2, ... from the tip, spread by `growth`: where the direct delta's size is measured."""
    distances, distance = {tip - first}, 1.0
    while distance < tip - first:
        distances.add(int(distance))
        distance = max(distance + 1, distance * growth)
    return tuple(tip - d for d in sorted(distances) if d > 0)


def interpolate_direct(tip: int, measured: Mapping[int, float]) -> dict[int, float]:
    """Size of the direct delta a -> tip for every a from the measured ones, linear between neighbours."""
    known = sorted(measured)
    sizes = {a: measured[a] for a in known}
    for low, high in itertools.pairwise(known):
        for a in range(low + 1, high):
            share = (a - low) / (high - low)
            sizes[a] = measured[low] * (1 - share) + measured[high] * share
    return sizes


def plan_compact(tip: int, hops: Sequence[Hop], direct_nbytes: Mapping[int, float]) -> tuple[int, ...]:
    """The bases from which a direct shortcut to the tip is to be written, newest first.

    hops: every forward hop between first..tip that the bucket has. direct_nbytes: for each version below the tip.
    """
    leaving: dict[int, list[Hop]] = {}
    for hop in hops:
        if hop.base_version is not None:
            leaving.setdefault(hop.base_version, []).append(hop)
    best: dict[int, tuple[float, int]] = {tip: (0.0, 0)}
    chosen = []
    for base in sorted(direct_nbytes, reverse=True):
        ways = [
            (hop.payload_nbytes + best[hop.version][0], 1 + best[hop.version][1])
            for hop in leaving.get(base, ())
            if hop.version in best
        ]
        good = [way for way in ways if way[0] <= SLACK * direct_nbytes[base] and way[1] <= max_hops(tip - base)]
        if good:
            best[base] = min(good)
        else:
            chosen.append(base)
            best[base] = (direct_nbytes[base], 1)
    return tuple(chosen)
