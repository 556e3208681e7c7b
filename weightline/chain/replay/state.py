"""States of the weights that are moved along a chain and checked at every version: the one replay engine.

Legend: N elements of a tensor, K changed ones. Bits are flat (row-major) unsigned integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, ReplayPlan, plan_between
from weightline.codec.changes import compose, join_parts, undo_decoded
from weightline.codec.digest import add_digests, digest_change, format_digest, tensor_digest
from weightline.dtypes import bits_dtype
from weightline.errors import DigestMismatchError, InputError, PayloadError
from weightline.format.manifest import Manifest
from weightline.format.payload import Payload, open_payload
from weightline.types import BitsArray, Changes, Segment, TensorSpec

Select = Callable[[str], bool]
#: The flat bits of a tensor by name. May be a view of the memory of an engine: read them, never write to them.
ReadBits = Callable[[str], BitsArray]


@dataclass(slots=True)
class ReplayState(ABC):
    """A state that deltas move along a chain. `digests` follow every change, so any version on the way can be checked.

    On an error a state may be torn: some changes of a version applied, others not. Throw it away then.
    """

    version: int | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)

    @abstractmethod
    def segment_bits(self, segment: Segment) -> BitsArray:
        """The segment's elements as they are in this state."""

    @abstractmethod
    def apply(self, parts: Iterable[Changes]) -> None:
        """Take the changes of one version, all ranks' together: of disjoint segments, all from the state before it.

        `parts` may be decoded on the way, from what `segment_bits` gives. Not safe to repeat.
        """

    def check(self, manifest: Manifest, select: Select | None = None) -> None:
        """DigestMismatchError unless this is the manifest's state, as far as `select` goes."""
        check_digests(self.digests, manifest, select)

    def _follow(self, changes: Changes) -> None:
        name = changes.segment.tensor.name
        self.digests[name] = add_digests(self.digests[name], digest_change(changes))


@dataclass(slots=True)
class HostState(ReplayState):
    """Bits of (some of) a version's tensors in host memory, by name. `version` is None before the first anchor."""

    bits: dict[str, BitsArray] = field(default_factory=dict)

    def segment_bits(self, segment: Segment) -> BitsArray:
        """A writable view of the segment's elements."""
        return self.bits[segment.tensor.name][segment.start : segment.stop]

    def apply(self, parts: Iterable[Changes]) -> None:
        for changes in parts:
            self.segment_bits(changes.segment)[changes.positions_K] = changes.new_K
            self._follow(changes)

    def allocate(self, specs: Iterable[TensorSpec]) -> None:
        """Zeros for these tensors and no others: what an anchor fills. InputError when this host has no room."""
        self.version = None
        self.specs = {spec.name: spec for spec in specs}
        self.bits = {name: _zeros(spec) for name, spec in self.specs.items()}
        self.digests = dict.fromkeys(self.specs, 0)

    def place(self, segment: Segment, bits_N: BitsArray) -> None:
        """Fill one part of a tensor that holds zeros there."""
        self.segment_bits(segment)[:] = bits_N
        name = segment.tensor.name
        self.digests[name] = add_digests(self.digests[name], tensor_digest(segment, bits_N))


@dataclass(slots=True)
class OverlaidState(ReplayState):
    """The state of weights that something else holds, such as an engine that goes on serving, after pending changes.

    `changes` lead from the held state to this one, by tensor. The base bits of a later version's delta are the held
    bits with the earlier changes laid over them, so there is no second copy of the model. Memory: the changes, and a
    copy of one segment at a time.
    """

    version: int
    specs: dict[str, TensorSpec]
    digests: dict[str, int]
    read_bits: ReadBits
    changes: dict[str, Changes] = field(default_factory=dict)

    def segment_bits(self, segment: Segment) -> BitsArray:
        """The segment's elements: read them, never write to them."""
        name = segment.tensor.name
        bits_N = self.read_bits(name)[segment.start : segment.stop]
        pending = self.changes.get(name)
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
        for name, held in by_tensor.items():
            joined = join_parts(held)
            self._follow(joined)
            earlier = self.changes.get(name)
            self.changes[name] = joined if earlier is None else compose(earlier, joined)


def check_digests(digests: Mapping[str, int], manifest: Manifest, select: Select | None = None) -> None:
    """DigestMismatchError unless `digests` are those of the manifest's (selected) tensors; it names the first other."""
    for name in filter(select, manifest.tensors):
        expected = manifest.tensors[name].digest
        actual = format_digest(digests[name]) if name in digests else "missing"
        if actual != expected:
            raise DigestMismatchError(
                f"tensor {name} has digest {actual}, the manifest of version {manifest.version} says {expected}",
                what=name, version=manifest.version, expected=expected, actual=actual,
            )  # fmt: skip


def read_state(chain: Chain, version: int, select: Select | None = None, fetcher: Fetcher | None = None) -> HostState:
    """Materialize a version (or the tensors that `select` names) by the cheapest way. Safe to repeat.

    Give a `fetcher` to read several groups of tensors without fetching payloads again.
    """
    state = HostState()
    advance_state(chain, state, version, select, fetcher)
    return state


def advance_state(
    chain: Chain, state: ReplayState, version: int, select: Select | None = None, fetcher: Fetcher | None = None
) -> None:
    """Move the state to `version` by the cheapest way. On any error the state is torn: throw it away."""
    plan = plan_between(chain, state.version, version)
    with nullcontext(fetcher) if fetcher else fetching(chain.store) as source:
        walk(chain, state, plan, source, select)


def walk(chain: Chain, state: ReplayState, plan: ReplayPlan, fetcher: Fetcher, select: Select | None = None) -> None:
    """Move the state along a plan and check digests after every hop. On any error the state is torn: throw it away."""
    fetcher.prefetch(ref for hop in plan.hops for ref in hop.payloads)
    for hop in plan.hops:
        apply_hop(chain, state, hop, fetcher, select)


def apply_hop(chain: Chain, state: ReplayState, hop: Hop, fetcher: Fetcher, select: Select | None = None) -> None:
    """Move the state along one hop and check it. Only a HostState can take an anchor.

    On any error the state is torn: throw it away.
    """
    assert hop.target is not None
    manifest = chain.manifest(hop.target)
    payloads = (open_payload(fetcher.fetch(ref)) for ref in hop.payloads)
    if hop.base_version is None:
        assert isinstance(state, HostState)
        specs = {name: spec for name, spec in manifest.specs.items() if select is None or select(name)}
        _place_anchor(state, specs, list(payloads))
    else:
        state.apply(_hop_changes(state, hop, manifest.specs, payloads))
    state.version = hop.target
    state.check(manifest, select)


def _place_anchor(state: HostState, specs: Mapping[str, TensorSpec], payloads: Sequence[Payload]) -> None:
    """Make room for these tensors and fill it. All payloads are opened before: a manifest alone can claim any size."""
    _require_cover(specs, payloads)
    state.allocate(specs.values())
    for payload in payloads:
        for segment, bits_N in payload.read_anchor(lambda s: s.tensor.name in specs):
            state.place(segment, bits_N)


def _hop_changes(
    state: ReplayState, hop: Hop, specs: Mapping[str, TensorSpec], payloads: Iterable[Payload]
) -> Iterator[Changes]:
    """The changes of the state's tensors, in the hop's direction."""
    for payload in payloads:
        _require_known_tensors(payload, state, specs)
        for changes in payload.read_changes(lambda s: s.tensor.name in state.specs, state.segment_bits):
            yield undo_decoded(changes) if hop.is_backward else changes


def _require_known_tensors(payload: Payload, state: ReplayState, specs: Mapping[str, TensorSpec]) -> None:
    for segment in payload.segments:
        tensor = segment.tensor
        if specs.get(tensor.name) != tensor or state.specs.get(tensor.name, tensor) != tensor:
            raise PayloadError(
                f"the payload covers {tensor}, the manifest says {specs.get(tensor.name)}", rule="known-tensor"
            )


def _require_cover(specs: Mapping[str, TensorSpec], payloads: Iterable[Payload]) -> None:
    """PayloadError unless the segments of these anchors hold each element of the tensors exactly once."""
    held: dict[str, list[Segment]] = {name: [] for name in specs}
    for payload in payloads:
        if payload.kind != "anchor":
            raise PayloadError(f"{payload.path.name}, a {payload.kind}, stands where an anchor must", rule="kind")
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
