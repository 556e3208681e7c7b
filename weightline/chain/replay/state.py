"""The replay engine: moves states of the weights along a chain, and checks their digests at every version.

Legend: N elements of a tensor, K changed ones. Bits are flat (row-major) unsigned integers.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import oldest_kept
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, ReplayPlan, Ways, direct_plan, plan_between, plan_replay
from weightline.codec.changes import compose, join_parts, undo_decoded
from weightline.codec.coding import num_cpus, num_threads_for, ordered_map
from weightline.codec.digest import add_digests, digest_change, format_digest, tensor_digest
from weightline.dtypes import bits_dtype
from weightline.errors import (
    CorruptError,
    DigestMismatchError,
    InputError,
    NotFoundError,
    PayloadError,
    StorageError,
    TransientStorageError,
    UnsupportedFeatureError,
    WeightlineError,
)
from weightline.format.header import HeaderV2
from weightline.format.payload import Payload
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.types import BitsArray, Changes, Segment, TensorSpec

_logger = logging.getLogger(__name__)

Select = Callable[[str], bool]
#: Digests by tensor: of a whole state or a group of tensors, or of the tensors that one worker holds.
MutableDigests = StateDigests | MutableMapping[str, int]
#: Returns the bits of a segment. They may be a view of an engine's memory, so they must not be written to.
ReadSegment = Callable[[Segment], BitsArray]


@dataclass(slots=True)
class ReplayState(ABC):
    """A state that deltas move along a chain. `digests` are updated with every change, so every hop can be checked.

    After an error a state may be torn: some changes of a version are applied, others are not. Discard it then.
    """

    version: int | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    digests: MutableDigests = field(default_factory=dict)

    @abstractmethod
    def apply_payloads(
        self, payloads: Iterable[Payload], specs: Mapping[str, TensorSpec], *, is_backward: bool
    ) -> None:
        """Applies the deltas of one version, of all ranks together. Not safe to repeat.

        specs: the tensors of the version. `is_backward`: from the version to its base. PayloadError.
        """

    def check(self, chain: Chain, version: int, select: Select | None = None) -> None:
        """Raises DigestMismatchError unless the tensors of `select` (None: all) have the version's digests."""
        check_digests(self.digests, chain, version, select)

    def require_known(self, payload: Payload, specs: Mapping[str, TensorSpec]) -> None:
        """Raises PayloadError unless the payload's tensors are those of the version (`specs`) and of this state."""
        for segment in payload.segments:
            tensor = segment.tensor
            if specs.get(tensor.name) != tensor or self.specs.get(tensor.name, tensor) != tensor:
                raise PayloadError(
                    f"the payload covers {tensor}, the manifest says {specs.get(tensor.name)}", rule="known-tensor"
                )


@dataclass(slots=True)
class DecodingState(ReplayState):
    """A state whose bits are at hand, so that payloads can be decoded against them, on all CPUs."""

    @abstractmethod
    def segment_bits(self, segment: Segment) -> BitsArray:
        """Returns the segment's elements in this state."""

    @abstractmethod
    def apply(self, parts: Iterable[Changes]) -> None:
        """Applies the changes of one version, of all ranks together. Not safe to repeat.

        Their segments are disjoint, and all of them refer to the state before this call. `parts` may be a generator
        that decodes them from the result of `segment_bits`.
        """

    def apply_payloads(
        self, payloads: Iterable[Payload], specs: Mapping[str, TensorSpec], *, is_backward: bool
    ) -> None:
        self.apply(self._decoded(payloads, specs, is_backward=is_backward))

    def _decoded(
        self, payloads: Iterable[Payload], specs: Mapping[str, TensorSpec], *, is_backward: bool
    ) -> Iterator[Changes]:
        """Yields the changes of the state's tensors, in the given direction."""
        for payload in payloads:
            self.require_known(payload, specs)
            for changes in payload.read_changes(
                lambda s: s.tensor.name in self.specs, self.segment_bits, num_threads=num_cpus()
            ):
                yield undo_decoded(changes) if is_backward else changes


@dataclass(slots=True)
class HostState(DecodingState):
    """Bits of (some of) a version's tensors in host memory, by name. `version` is None before the first anchor."""

    bits: dict[str, BitsArray] = field(default_factory=dict)

    def segment_bits(self, segment: Segment) -> BitsArray:
        """Returns a writable view of the segment's elements."""
        return self.bits[segment.tensor.name][segment.start : segment.stop]

    def apply(self, parts: Iterable[Changes]) -> None:
        for changes in parts:
            self.segment_bits(changes.segment)[changes.positions_K] = changes.new_K
            name = changes.segment.tensor.name
            self.digests[name] = add_digests(self.digests[name], digest_change(changes))

    def allocate(self, specs: Layout | Iterable[TensorSpec]) -> None:
        """Replaces the state by zeros for these tensors, which an anchor fills. InputError without enough memory."""
        self.version = None
        layout = specs if isinstance(specs, Layout) else Layout.of(specs)
        self.specs = layout.by_name
        self.bits = {name: _zeros(spec) for name, spec in self.specs.items()}
        self.digests = StateDigests.zeros(layout)

    def place(self, segment: Segment, bits_N: BitsArray) -> None:
        """Fills one part of a tensor that holds zeros there."""
        self.segment_bits(segment)[:] = bits_N
        name = segment.tensor.name
        self.digests[name] = add_digests(self.digests[name], tensor_digest(segment, bits_N))


@dataclass(slots=True)
class OverlaidState(DecodingState):
    """A state kept as changes on top of weights that another owner holds, such as an engine that is serving them.

    `changes` lead from the held weights to this state, by tensor. The base bits of a later version's delta are the held
    bits with the earlier changes laid over them, so there is no second copy of the model. Memory: the changes, and a
    copy of one segment at a time.
    """

    version: int
    specs: dict[str, TensorSpec]
    digests: MutableDigests
    read_segment: ReadSegment
    changes: dict[str, Changes] = field(default_factory=dict)

    @property
    def num_changed(self) -> int:
        return sum(one.num_changed for one in self.changes.values())

    def segment_bits(self, segment: Segment) -> BitsArray:
        """Returns the segment's elements. They must not be written to."""
        bits_N = self.read_segment(segment)
        pending = self.changes.get(segment.tensor.name)
        if pending is None:
            return bits_N
        bits_N = bits_N.copy()
        low, high = pending.positions_K.searchsorted((segment.start, segment.stop))
        bits_N[pending.positions_K[low:high] - segment.start] = pending.new_K[low:high]
        return bits_N

    def apply(self, parts: Iterable[Changes]) -> None:
        by_tensor: dict[str, list[Changes]] = defaultdict(list)
        for part in parts:
            by_tensor[part.segment.tensor.name].append(part)
        num_changed = sum(part.num_changed for held in by_tensor.values() for part in held)
        done = ordered_map(self._laid_over, by_tensor.values(), num_threads_for(num_changed))
        for name, (changes, digest) in zip(by_tensor, done, strict=True):
            self.changes[name] = changes
            self.digests[name] = add_digests(self.digests[name], digest)

    def _laid_over(self, parts: Sequence[Changes]) -> tuple[Changes, int]:
        """Returns a tensor's changes from the held weights to the next version, and the last step's digest change."""
        joined = join_parts(parts)
        earlier = self.changes.get(joined.segment.tensor.name)
        return joined if earlier is None else compose(earlier, joined), digest_change(joined)


State = TypeVar("State", bound=ReplayState)


def check_digests(
    digests: Mapping[str, int] | StateDigests, chain: Chain, version: int, select: Select | None = None
) -> None:
    """Raises DigestMismatchError, with the first tensor that differs, unless `digests` are the version's.

    `select` limits the comparison to some tensors; None means all. The digests of all tensors are proven by the root in
    the version's header, without a look at its list of digests.
    """
    if select is None and isinstance(digests, StateDigests) and _have_root(digests, chain, version):
        return
    stated = chain.digests(version)
    if isinstance(digests, StateDigests) and digests == stated:
        return
    for name in filter(select, stated):
        expected = format_digest(stated[name])
        actual = format_digest(digests[name]) if name in digests else "missing"
        if actual != expected:
            raise DigestMismatchError(
                f"tensor {name} has digest {actual}, the manifest of version {version} says {expected}",
                what=name, version=version, expected=expected, actual=actual,
            )  # fmt: skip


def _have_root(digests: StateDigests, chain: Chain, version: int) -> bool:
    """Returns whether the digests have the root of the version's header. False for a version of format 1."""
    header = chain.header(version)
    if not isinstance(header, HeaderV2) or chain.layout(version) != digests.layout:
        return False
    return digests.root(header.layout.sha256) == header.root


def read_state(chain: Chain, version: int, select: Select | None = None, fetcher: Fetcher | None = None) -> HostState:
    """Reads a version, or the tensors that `select` names, by the cheapest path. Safe to repeat.

    Pass a `fetcher` to read several groups of tensors without fetching payloads again.
    """
    state = HostState()
    advance_state(chain, state, version, select, fetcher)
    return state


def advance_state(
    chain: Chain,
    state: HostState,
    version: int,
    select: Select | None = None,
    fetcher: Fetcher | None = None,
    ways: Ways | None = None,
) -> None:
    """Moves the state to `version` by the cheapest path. After an error the state is torn: discard it.

    Pass `ways` to plan several paths by one look at the bucket.
    """
    is_begun = False

    def begin() -> HostState:
        nonlocal is_begun
        if is_begun:
            state.version = None  # a failure may have torn it: the next path starts at an anchor
        is_begun = True
        return state

    with nullcontext(fetcher) if fetcher else fetching(chain.store) as source:
        replay(chain, begin, version, source, select, ways)


def replay(
    chain: Chain,
    begin: Callable[[], State],
    version: int,
    fetcher: Fetcher,
    select: Select | None = None,
    ways: Ways | None = None,
) -> tuple[State, ReplayPlan]:
    """Moves a state from `begin()` to `version` by the cheapest path, and returns it with the path.

    A path that turns out broken is left: when a shortcut's objects are missing, or do not hold what the shortcut says,
    and when history is collected while it is read. Then another path is taken, from another `begin()`. A state that
    cannot take an anchor is returned as it began when the path leads through one.
    """
    lost: set[int] = set()
    while True:
        state = begin()
        if ways is not None and not fetcher.broken_shortcuts:
            plan = plan_replay(ways, state.version, version, ways.stands)
        else:
            plan = (None if lost else direct_plan(chain, state.version, version)) or plan_between(
                chain, state.version, version, fetcher.broken_shortcuts
            )
        if plan.hops and plan.hops[0].base_version is None and not isinstance(state, HostState):
            return state, plan
        fetcher.prefetch(ref for hop in plan.hops for ref in hop.payloads)
        for hop in plan.hops:
            try:
                apply_hop(chain, state, hop, fetcher, select)
            except (NotFoundError, CorruptError, UnsupportedFeatureError, StorageError) as error:
                if not _may_go_round(chain, hop, error, fetcher, lost):
                    raise
                _logger.warning("%s: another path to version %d is taken: %s", chain.url, version, error)
                break
        else:
            return state, plan


def _may_go_round(chain: Chain, hop: Hop, error: WeightlineError, fetcher: Fetcher, lost: set[int]) -> bool:
    """Returns whether there may be a path without this hop, and sees to it that it is not planned again."""
    if isinstance(error, TransientStorageError):
        return False
    if hop.shortcut_key is not None:
        fetcher.broken_shortcuts.add(hop.shortcut_key)
        return True
    # gc deletes headers first, and only behind the horizon: the next plan finds the version gone.
    is_collected = isinstance(error, NotFoundError) and hop.version < oldest_kept(chain) and hop.version not in lost
    lost.add(hop.version)
    return is_collected


def apply_hop(chain: Chain, state: ReplayState, hop: Hop, fetcher: Fetcher, select: Select | None = None) -> None:
    """Moves the state along one hop and checks it. Only a HostState can take an anchor.

    After an error the state is torn: discard it.
    """
    assert hop.target is not None
    layout = chain.layout(hop.target)
    payloads = (fetcher.open(ref) for ref in hop.payloads)
    if hop.base_version is None:
        assert isinstance(state, HostState)
        _place_anchor(state, _selected(layout, select), list(payloads))
    else:
        state.apply_payloads(payloads, layout.by_name, is_backward=hop.is_backward)
    state.version = hop.target
    state.check(chain, hop.target, select)


def _selected(layout: Layout, select: Select | None) -> Layout:
    return layout if select is None else Layout.of(spec for spec in layout.specs if select(spec.name))


def _place_anchor(state: HostState, layout: Layout, payloads: Sequence[Payload]) -> None:
    """Allocates these tensors and fills them.

    All payloads are opened before the allocation, since a header alone can claim any size.
    """
    _require_cover(layout.by_name, payloads)
    state.allocate(layout)
    for payload in payloads:
        for segment, bits_N in payload.read_anchor(lambda s: s.tensor.name in layout.index):
            state.place(segment, bits_N)


def _require_cover(specs: Mapping[str, TensorSpec], payloads: Iterable[Payload]) -> None:
    """Raises PayloadError unless the segments of these anchors hold each element of the tensors exactly once."""
    held: dict[str, list[Segment]] = {name: [] for name in specs}
    for payload in payloads:
        if payload.kind != "anchor":
            raise PayloadError(f"{payload.path.name} is a {payload.kind}, and must be an anchor", rule="kind")
        for segment in payload.segments:
            if specs.get(segment.tensor.name) == segment.tensor and segment.length:
                held[segment.tensor.name].append(segment)
    for name, spec in specs.items():
        end = 0
        for segment in sorted(held[name], key=lambda segment: segment.start):
            end = segment.stop if segment.start == end else -1
        if end != spec.num_elements:
            raise PayloadError(f"the anchor's payloads do not hold {spec} exactly once", rule="anchor-cover")


def _zeros(spec: TensorSpec) -> BitsArray:
    try:
        return np.zeros(spec.num_elements, bits_dtype(spec.dtype))
    except MemoryError as error:
        raise InputError(
            f"tensor {spec.name} takes {spec.nbytes} bytes, which this host cannot hold", tensor=spec.name
        ) from error
