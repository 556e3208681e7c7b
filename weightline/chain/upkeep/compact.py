"""Compaction: writes shortcuts and anchors that make catching up cheap, as `compact_plan` decides.

The writing works through the model a bounded group of tensors at a time and holds two states of a group.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import oldest_kept
from weightline.chain.replay.diff import GROUP_NBYTES, tensor_groups
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, Routes, ShortcutKeys, Ways, plan_between
from weightline.chain.replay.state import HostState, advance_state, read_state
from weightline.chain.upkeep.compact_plan import (
    REQUEST_NBYTES,
    first_base,
    interpolate_direct,
    plan_compact,
    sample_bases,
)
from weightline.chain.write.commit import put_shortcut
from weightline.chain.write.draft import Draft
from weightline.codec.anchor import ANCHOR_CODING
from weightline.codec.capture import capture
from weightline.codec.coding import coding_named, num_cpus, ordered_map_in_batches
from weightline.format import keys
from weightline.format.shortcut import Shortcut
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.types import Changes, TensorSpec, whole


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
    chain: Chain,
    *,
    coding: str,
    policy: AnchorPolicy | None = None,
    group_nbytes: int = GROUP_NBYTES,
    least_saving_nbytes: float = REQUEST_NBYTES,
) -> CompactionPlan:
    """Plans a compaction of the chain. Writes nothing. UnsupportedFeatureError for an unknown coding.

    Reads as far back as `first_base` says, which is the sooner the shorter ago the compaction before was.
    """
    coding_named(coding)
    tip, kept = chain.tip_header(), oldest_kept(chain)
    late_joiner = plan_between(chain, None, tip.version)
    writes_anchor = (policy or AnchorPolicy()).wants_anchor(late_joiner.hops, tip.num_elements)
    previous, sizes = _previous_compaction(chain, tip.version)
    first = max(kept, first_base(tip.version, previous, sizes, least_saving_nbytes))
    if first == tip.version:
        return CompactionPlan(tip.version, (), {}, writes_anchor)
    ways = Ways(chain, first=first + 1, last=tip.version, first_base=first)
    hops = [hop for version in chain.versions(first + 1) for hop in ways(version)]
    measured = _measure(chain, sample_bases(first, tip.version), coding, group_nbytes)
    direct = interpolate_direct(tip.version, measured)
    bases = plan_compact(tip.version, hops, direct, least_saving_nbytes)
    return CompactionPlan(tip.version, bases, direct, writes_anchor)


def _previous_compaction(chain: Chain, tip: int) -> tuple[int | None, dict[int, float]]:
    """Returns the newest version before the tip that shortcuts lead to, and bytes of some of them by distance.

    Costs a few listings, and a read for each doubling of the distance.
    """
    listed = ShortcutKeys(chain, 0, tip - 1)
    previous = listed.newest_target()
    if previous is None:
        return None, {}
    ways = Ways(chain, first=previous, last=previous)
    bases = [base for base in listed.bases_of(previous) if base is not None]
    # The nearest base of each doubling of the distance says how deltas grow.
    chosen = {(previous - base).bit_length(): base for base in sorted(bases)}
    found = (ways.shortcut(keys.shortcut(base, previous)) for base in chosen.values())
    return previous, {
        previous - one.base_version: one.payload_nbytes
        for one in found
        if one is not None and one.base_version is not None
    }


def write_compaction(
    chain: Chain, plan: CompactionPlan, *, coding: str, group_nbytes: int = GROUP_NBYTES
) -> list[Shortcut]:
    """Writes the planned shortcuts. Safe to repeat: an existing shortcut is kept. A crash leaves orphans for gc."""
    tip = chain.header(plan.tip)
    drafts = {base: Draft(tip.version) for base in plan.bases}
    anchor = Draft(tip.version)
    with _workspace(chain) as (fetcher, path):
        for names in tensor_groups(chain.layout(tip.version).specs, group_nbytes):
            at_tip = read_state(chain, tip.version, names.__contains__, fetcher)
            if plan.writes_anchor:
                parts = ((whole(spec), at_tip.bits[name]) for name, spec in at_tip.specs.items() if spec.num_elements)
                _put_payload(chain, anchor, write_anchor(path, parts, num_threads=num_cpus()), path)
            for base, changes in _direct_deltas(chain, plan.bases, at_tip, coding, fetcher):
                if changes:
                    info = write_delta(path, changes, coding, num_threads=num_cpus())
                    _put_payload(chain, drafts[base], info, path)
    shortcuts = [draft.shortcut(tip, chain.header(base), coding) for base, draft in drafts.items()]
    if plan.writes_anchor:
        shortcuts.append(anchor.shortcut(tip, None, ANCHOR_CODING))
    return [put_shortcut(chain, shortcut) for shortcut in shortcuts]


def _put_payload(chain: Chain, draft: Draft, info: PayloadInfo, path: Path) -> None:
    number = len(draft.payloads)
    chain.store.put_file(draft.key(number), path)
    draft.add(number, info.nbytes, info.sha256, info.num_changed)


def _measure(chain: Chain, bases: tuple[int, ...], coding: str, group_nbytes: int) -> dict[int, float]:
    """Returns the bytes of the direct delta from each base to the tip."""
    tip = chain.tip_header()
    nbytes: dict[int, float] = defaultdict(float, dict.fromkeys(bases, 0.0))
    with _workspace(chain) as (fetcher, path):
        for names in tensor_groups(chain.layout(tip.version).specs, group_nbytes):
            at_tip = read_state(chain, tip.version, names.__contains__, fetcher)
            for base, changes in _direct_deltas(chain, bases, at_tip, coding, fetcher):
                if changes:
                    nbytes[base] += write_delta(path, changes, coding, num_threads=num_cpus()).nbytes
    return dict(nbytes)


def _direct_deltas(
    chain: Chain, bases: Iterable[int], at_tip: HostState, coding: str, fetcher: Fetcher
) -> Iterator[tuple[int, list[Changes]]]:
    """Yields the changes from each base to the tip, for the tensors of `at_tip`. One state moves from base to base."""
    state, routes = HostState(), Routes(chain)

    def compare(spec: TensorSpec) -> Changes:
        is_ranked = coding_named(coding).ranked
        return capture(whole(spec), state.bits[spec.name], at_tip.bits[spec.name], ranked=is_ranked)

    for base in sorted(bases):
        advance_state(chain, state, base, at_tip.specs.__contains__, fetcher, routes)
        captured = ordered_map_in_batches(
            compare, at_tip.specs.values(), num_cpus(), size_of=lambda spec: spec.num_elements
        )
        yield base, [changes for changes in captured if changes.num_changed]


@contextmanager
def _workspace(chain: Chain) -> Iterator[tuple[Fetcher, Path]]:
    """Provides a fetcher and a scratch path for the length of one operation."""
    with fetching(chain.store) as fetcher, tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        yield fetcher, Path(folder) / "payload.safetensors"
