"""Compaction: writes shortcuts and anchors that make catching up cheap. Plans with pure functions, then writes.

A reader at version a < tip should reach the tip with at most `SLACK` times the bytes of the direct delta, and in at
most about 2 log2(distance) hops. Going back from the tip, a direct shortcut a -> tip is added exactly where the best
path so far breaks one of the two, so both bounds hold by construction. The writing works through the model a bounded
group of tensors at a time and holds two states of a group.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import oldest_kept
from weightline.chain.replay.diff import GROUP_NBYTES, tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, Ways, plan_between
from weightline.chain.replay.state import HostState, advance_state, read_state
from weightline.chain.write.commit import put_shortcut
from weightline.chain.write.draft import Draft
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.capture import capture_tensors
from weightline.codec.coding import coding_named
from weightline.format.shortcut import Shortcut
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.types import Changes, whole

#: Bytes of the planned path over bytes of the direct delta. It is below the documented 1.3, since the sizes of direct
#: deltas are interpolated.
SLACK = 1.25


@dataclass(frozen=True, slots=True)
class AnchorPolicy:
    """Decides when an anchor is worth its bytes: when a new reader needs more time for the deltas than for an anchor.

    The rates are those of one reader: bytes downloaded per second, and elements decoded per second from deltas and
    from anchors.
    """

    download_nbytes_per_second: float = 250e6
    delta_elements_per_second: float = 10e6
    anchor_elements_per_second: float = 120e6

    def replay_seconds(self, hops: Sequence[Hop], num_elements: int) -> float:
        """Returns the seconds that a new reader needs for the hops."""
        return sum(self._hop_seconds(hop, num_elements) for hop in hops)

    def _hop_seconds(self, hop: Hop, num_elements: int) -> float:
        is_anchor = hop.base_version is None
        decode = num_elements / self.anchor_elements_per_second
        if not is_anchor:
            decode = hop.num_changed / self.delta_elements_per_second
        return hop.payload_nbytes / self.download_nbytes_per_second + decode

    def wants_anchor(self, hops: Sequence[Hop], num_elements: int) -> bool:
        """Returns whether a new reader's deltas take longer than its anchor, which a new anchor would replace.

        `hops` are a path from nothing: an anchor, then deltas.
        """
        anchor, deltas = hops[:1], hops[1:]
        return self.replay_seconds(deltas, num_elements) > self.replay_seconds(anchor, num_elements)


def max_hops(distance: int) -> int:
    """Returns the bound of hops for a reader that is `distance` versions behind."""
    return 2 * math.ceil(math.log2(distance + 1)) + 1


def sample_bases(first: int, tip: int, growth: float = 1.2) -> tuple[int, ...]:
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


def plan_compact(tip: int, hops: Sequence[Hop], direct_nbytes: Mapping[int, float]) -> tuple[int, ...]:
    """Returns the bases from which a direct shortcut to the tip is to be written, newest first.

    `hops`: every forward hop in first..tip that the bucket has. `direct_nbytes`: for each version below the tip.
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


@dataclass(frozen=True, slots=True)
class CompactionPlan:
    """The shortcuts and the anchor that a compaction writes."""

    tip: int
    bases: tuple[int, ...]
    """Versions that get a direct shortcut to the tip."""
    direct_nbytes: dict[int, float]
    """Bytes of the direct delta to the tip, measured or interpolated, for every version below it."""
    writes_anchor: bool
    """True when the tip gets an anchor."""


def plan_compaction(
    chain: Chain, *, coding: str, policy: AnchorPolicy | None = None, group_nbytes: int = GROUP_NBYTES
) -> CompactionPlan:
    """Plans a compaction of the chain. Writes nothing. UnsupportedFeatureError for an unknown coding."""
    coding_named(coding)
    tip = chain.tip()
    first = oldest_kept(chain)
    manifests = chain.manifests(first)
    late_joiner = plan_between(chain, None, tip.version)
    writes_anchor = (policy or AnchorPolicy()).wants_anchor(late_joiner.hops, tip.num_elements)
    if first == tip.version:
        return CompactionPlan(tip.version, (), {}, writes_anchor)
    ways = Ways(chain)
    hops = [hop for manifest in manifests for hop in ways(manifest.version)]
    measured = _measure(chain, sample_bases(first, tip.version), coding, group_nbytes)
    direct = interpolate_direct(tip.version, measured)
    return CompactionPlan(tip.version, plan_compact(tip.version, hops, direct), direct, writes_anchor)


def write_compaction(
    chain: Chain, plan: CompactionPlan, *, coding: str, group_nbytes: int = GROUP_NBYTES
) -> list[Shortcut]:
    """Writes the planned shortcuts. Safe to repeat: an existing shortcut is kept. A crash leaves orphans for gc."""
    tip = chain.manifest(plan.tip)
    drafts = {base: Draft(tip.version) for base in plan.bases}
    anchor = Draft(tip.version)
    with _workspace(chain) as (fetcher, path):
        for names in tensor_groups(tip.specs.values(), group_nbytes):
            at_tip = read_state(chain, tip.version, names.__contains__, fetcher)
            if plan.writes_anchor:
                parts = ((whole(spec), at_tip.bits[name]) for name, spec in at_tip.specs.items() if spec.num_elements)
                _put_payload(chain, anchor, write_anchor(path, parts), path)
            for base, changes in _direct_deltas(chain, plan.bases, at_tip, coding, fetcher):
                if changes:
                    _put_payload(chain, drafts[base], write_delta(path, changes, coding), path)
    shortcuts = [draft.shortcut(tip, chain.manifest(base), coding) for base, draft in drafts.items()]
    if plan.writes_anchor:
        shortcuts.append(anchor.shortcut(tip, None, ANCHOR_CODING))
    return [put_shortcut(chain, shortcut) for shortcut in shortcuts]


def _put_payload(chain: Chain, draft: Draft, info: PayloadInfo, path: Path) -> None:
    number = len(draft.payloads)
    chain.store.put_file(draft.key(number), path)
    draft.add(number, info.nbytes, info.sha256, info.num_changed)


def _measure(chain: Chain, bases: tuple[int, ...], coding: str, group_nbytes: int) -> dict[int, float]:
    """Returns the bytes of the direct delta from each base to the tip."""
    tip = chain.tip()
    nbytes: dict[int, float] = defaultdict(float, dict.fromkeys(bases, 0.0))
    with _workspace(chain) as (fetcher, path):
        for names in tensor_groups(tip.specs.values(), group_nbytes):
            at_tip = read_state(chain, tip.version, names.__contains__, fetcher)
            for base, changes in _direct_deltas(chain, bases, at_tip, coding, fetcher):
                nbytes[base] += write_delta(path, changes, coding).nbytes if changes else 0
    return dict(nbytes)


def _direct_deltas(
    chain: Chain, bases: Iterable[int], at_tip: HostState, coding: str, fetcher: Fetcher
) -> Iterator[tuple[int, list[Changes]]]:
    """Yields the changes from each base to the tip, for the tensors of `at_tip`. One state moves from base to base."""
    state = HostState()
    for base in sorted(bases):
        ranked = coding_named(coding).ranked
        advance_state(chain, state, base, at_tip.specs.__contains__, fetcher)
        yield base, list(capture_tensors(at_tip.specs.values(), state.bits, at_tip.bits, ranked=ranked))


@contextmanager
def _workspace(chain: Chain) -> Iterator[tuple[Fetcher, Path]]:
    """Provides a fetcher and a scratch path for the length of one operation."""
    with fetching(chain.store) as fetcher, tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        yield fetcher, Path(folder) / "payload.safetensors"
