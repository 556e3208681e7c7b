"""A state of the weights in host memory, moved along a chain and checked at every version.

Legend: N elements of a tensor, K changed ones. Bits are flat (row-major) unsigned integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import Fetcher, fetching
from weightline.chain.replay.plan import Hop, plan_between
from weightline.codec.changes import taken_back
from weightline.codec.digest import add_digests, digest_change, format_digest, parse_digest, tensor_digest
from weightline.dtypes import bits_dtype
from weightline.errors import DigestMismatchError, InputError, PayloadError
from weightline.format.manifest import Manifest
from weightline.format.payload import Payload, open_payload
from weightline.types import BitsArray, Changes, Segment, TensorSpec

Select = Callable[[str], bool]


@dataclass(slots=True)
class HostState:
    """Bits of (some of) a version's tensors, by name, with their digests. `version` is None before the first anchor."""

    version: int | None = None
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    bits: dict[str, BitsArray] = field(default_factory=dict)
    digests: dict[str, int] = field(default_factory=dict)

    def segment_bits(self, segment: Segment) -> BitsArray:
        """A writable view of the segment's elements."""
        return self.bits[segment.tensor.name][segment.start : segment.stop]

    def apply(self, changes: Changes) -> None:
        """Scatter the changed elements and follow the digest. Not safe to repeat."""
        self.segment_bits(changes.segment)[changes.positions_K] = changes.new_K
        name = changes.segment.tensor.name
        self.digests[name] = add_digests(self.digests[name], digest_change(changes))

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

    def check(self, manifest: Manifest, select: Select | None = None) -> None:
        """Compare the digests of all (selected) tensors with the manifest's: DigestMismatchError names the first...

        A tensor that no payload brought has digest 0, and differs.
        """
        for name in filter(select, manifest.tensors):
            digest, expected = self.digests.get(name, 0), manifest.tensors[name].digest
            if digest != parse_digest(expected):
                raise DigestMismatchError(
                    f"tensor {name} at version {manifest.version}: digest {format_digest(digest)}, "
                    f"the manifest says {expected}",
                    what=name, version=manifest.version, expected=expected, actual=format_digest(digest),
                )  # fmt: skip


def read_state(chain: Chain, version: int, select: Select | None = None, fetcher: Fetcher | None = None) -> HostState:
    """Materialize a version (or the tensors that `select` names) by the cheapest way. Safe to repeat.

    Give a `fetcher` to read several groups of tensors without fetching payloads again.
    """
    state = HostState()
    advance_state(chain, state, version, select, fetcher)
    return state


def advance_state(
    chain: Chain, state: HostState, version: int, select: Select | None = None, fetcher: Fetcher | None = None
) -> None:
    """Move the state to `version`, checking digests after every hop. On any error the state is torn: throw it away."""
    plan = plan_between(chain, state.version, version)
    with nullcontext(fetcher) if fetcher else fetching(chain.store) as source:
        source.prefetch(ref for hop in plan.hops for ref in hop.payloads)
        for hop in plan.hops:
            apply_hop(chain, state, hop, source, select)


def apply_hop(chain: Chain, state: HostState, hop: Hop, fetcher: Fetcher, select: Select | None = None) -> None:
    """Move the state along one hop and check it. On any error the state is torn: throw it away."""
    assert hop.target is not None
    manifest = chain.manifest(hop.target)
    payloads = (open_payload(fetcher.fetch(ref)) for ref in hop.payloads)
    if hop.base_version is None:
        specs = {name: spec for name, spec in manifest.specs.items() if select is None or select(name)}
        _place_anchor(state, specs, list(payloads))
    else:
        for payload in payloads:
            _require_known_tensors(payload, state)
            for changes in read_changes(payload, hop, state.segment_bits, state.specs.__contains__):
                state.apply(changes)
    state.version = hop.target
    state.check(manifest, select)


def _place_anchor(state: HostState, specs: Mapping[str, TensorSpec], payloads: Sequence[Payload]) -> None:
    """Make room for these tensors and fill it. All payloads are opened before: a manifest alone can claim any size."""
    _require_cover(specs, payloads)
    state.allocate(specs.values())
    for payload in payloads:
        for segment, bits_N in payload.read_anchor(lambda s: s.tensor.name in specs):
            state.place(segment, bits_N)


def read_changes(
    payload: Payload, hop: Hop, bits_of: Callable[[Segment], BitsArray], select: Select | None = None
) -> Iterator[Changes]:
    """A delta payload's changes in the hop's direction. `bits_of` gives a segment's bits where the reader stands."""
    for changes in payload.read_changes(lambda s: select is None or select(s.tensor.name), bits_of):
        yield taken_back(changes) if hop.is_backward else changes


def _require_known_tensors(payload: Payload, state: HostState) -> None:
    for segment in payload.segments:
        if state.specs.get(segment.tensor.name, segment.tensor) != segment.tensor:
            raise PayloadError(f"the payload covers {segment.tensor}, not in the base", rule="known-tensor")


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
