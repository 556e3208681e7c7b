"""Plans shortcuts with pure functions: which bases get a direct delta to the tip, and how far back to look for them.

A reader at version a < tip should reach the tip with at most `SLACK` times the bytes of the direct delta, and in at
most about 2 log2(distance) hops. Going back from the tip, a direct shortcut a -> tip is added exactly where the best
path so far breaks one of the two, so both bounds hold by construction.

**How far back.** A compaction that looked at all of history each time would cost more with every version. But a reader
far behind is well served by an earlier compaction: it goes to the version that was the tip then, and on from there.
That costs it the way from there once more, which is little where it is little beside the whole way. So a compaction
looks back as far as the versions since an earlier tip are not little, by the sizes of the shortcuts that lead there.

Every version since the previous compaction would be paid for again by each later one if each looked back equally far.
The spans therefore follow the binary digits of version numbers: a compaction at `tip` answers for the largest power of
two of which a multiple lies in (previous, tip]. A version is looked at once for each power of two, and its readers'
ways on from earlier tips halve at each, so that their sum stays small.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from weightline.chain.replay.plan import Hop

#: Bytes of the planned path over bytes of the direct delta, for bases that a compaction looks at.
SLACK = 1.2
#: What a reader from farther back pays for the way on from an earlier tip, over the bytes of its direct delta. Ways on
#: from ever nearer tips add up to less than twice this, so that SLACK and they stay within the documented 1.3.
FAR_SHARE = 0.05
#: A shortcut that saves a reader fewer bytes is not worth an object: in the 10 ms that its request takes, a connection
#: of 50 Mbit/s, as between sites, carries as many. Deltas that are smaller are mostly header.
REQUEST_NBYTES = 1 << 16
#: Growth of the distances at which direct deltas are measured. Their sizes grow as a power of the distance between 0
#: and 1, of which a line between two such distances is off by half a percent.
SAMPLE_GROWTH = 1.5


def max_hops(distance: int) -> int:
    """Returns the bound of hops for a reader that is `distance` versions behind."""
    return 2 * math.ceil(math.log2(distance + 1)) + 1


def first_base(tip: int, previous: int | None, sizes: Mapping[int, float], least_saving_nbytes: float) -> int:
    """Returns the oldest base that a compaction at `tip` looks at; 0 for all of history.

    previous: the tip of the compaction before; None without one. sizes: bytes of direct deltas that are known, by their
    distance, such as those of the shortcuts to `previous`.
    """
    if previous is None or len(sizes) < 2:
        return 0
    span = 1 << ((previous ^ tip).bit_length() - 1)
    way_on, distance = _size_at(sizes, span), 2.0 * span
    while way_on > max(least_saving_nbytes, FAR_SHARE * _size_at(sizes, distance)) and distance < tip:
        distance *= SAMPLE_GROWTH
    return max(0, tip - math.ceil(distance))


def _size_at(sizes: Mapping[int, float], distance: float) -> float:
    """Returns the size of a direct delta over a distance: by a power of it through the two nearest known sizes.

    Beyond the known ones they go on to grow as they did last, but no faster than the distance.
    """
    known = sorted(sizes)
    at = min(max(bisect_left(known, distance), 1), len(known) - 1)
    near, far = known[at - 1], known[at]
    growth = math.log(max(sizes[far], 1.0) / max(sizes[near], 1.0)) / math.log(far / near)
    return max(sizes[far], 1.0) * math.pow(distance / far, min(max(growth, 0.0), 1.0))


def sample_bases(first: int, tip: int, growth: float = SAMPLE_GROWTH) -> tuple[int, ...]:
    """Returns the versions from which the size of the direct delta is measured: distances from the tip by `growth`."""
    distances, distance = {tip - first}, 1.0
    while distance < tip - first:
        distances.add(int(distance))
        distance = max(distance + 1, distance * growth)
    return tuple(tip - d for d in sorted(distances) if d > 0)


def interpolate_direct(tip: int, measured: Mapping[int, float]) -> dict[int, float]:
    """Returns the size of the direct delta a -> tip for every a, interpolated linearly between measured neighbors."""
    known = sorted(measured)
    sizes = {a: measured[a] for a in known}
    for low, high in itertools.pairwise(known):
        for a in range(low + 1, high):
            share = (a - low) / (high - low)
            sizes[a] = measured[low] * (1 - share) + measured[high] * share
    return sizes


def plan_compact(
    tip: int, hops: Sequence[Hop], direct_nbytes: Mapping[int, float], least_saving_nbytes: float = REQUEST_NBYTES
) -> tuple[int, ...]:
    """Returns the bases from which a direct shortcut to the tip is to be written, newest first.

    `hops`: every forward hop among these versions that the bucket has. `direct_nbytes`: for each version that is looked
    at. A path stands without a shortcut that would save less than `least_saving_nbytes`, if it is short enough.
    """
    leaving: dict[int, list[Hop]] = {}
    for hop in hops:
        if hop.base_version is not None:
            leaving.setdefault(hop.base_version, []).append(hop)
    best: dict[int, tuple[float, int]] = {tip: (0.0, 0)}
    chosen = []
    for base in sorted(direct_nbytes, reverse=True):
        direct = direct_nbytes[base]
        bound = max(SLACK * direct, direct + least_saving_nbytes)
        ways = [
            (hop.payload_nbytes + best[hop.version][0], 1 + best[hop.version][1])
            for hop in leaving.get(base, ())
            if hop.version in best
        ]
        good = [way for way in ways if way[0] <= bound and way[1] <= max_hops(tip - base)]
        if good:
            best[base] = min(good)
        else:
            chosen.append(base)
            best[base] = (direct, 1)
    return tuple(chosen)
