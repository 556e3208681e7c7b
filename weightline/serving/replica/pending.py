"""What an engine's weights would be after deltas that are decoded but not written: the engine goes on serving.

The base bits of a later version's delta are the engine's own bits with the earlier deltas laid over them, so nobody
keeps a second copy of the model. Memory: the changes, and a copy of one segment at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from weightline.codec.changes import compose, join_parts
from weightline.codec.digest import add_digests, digest_change, format_digest
from weightline.errors import DigestMismatchError, PayloadError
from weightline.format.manifest import Manifest
from weightline.types import BitsArray, Changes, Segment, TensorSpec

#: The flat bits of a tensor by name. May be a view of the engine's own memory: read, never write.
ReadBits = Callable[[str], BitsArray]


class PendingState:
    """The engine's state as it would be. `changes` and `digests` lead from the engine's state to it."""

    def __init__(self, specs: dict[str, TensorSpec], read_bits: ReadBits, digests: dict[str, int]) -> None:
        self.specs = specs
        self.digests = dict(digests)
        self.changes: dict[str, Changes] = {}
        self._read_bits = read_bits

    def segment_bits(self, segment: Segment) -> BitsArray:
        """The segment's bits after what was added so far. PayloadError for a tensor that the engine does not hold."""
        spec = segment.tensor
        known = self.specs.get(spec.name)
        if spec != known:
            raise PayloadError(f"the payload covers {spec}, the manifest says {known}", rule="known-tensor")
        bits_N = self._read_bits(spec.name)[segment.start : segment.stop]
        pending = self.changes.get(spec.name)
        if pending is None:
            return bits_N
        bits_N = bits_N.copy()
        low, high = pending.positions_K.searchsorted((segment.start, segment.stop))
        bits_N[pending.positions_K[low:high] - segment.start] = pending.new_K[low:high]
        return bits_N

    def add(self, parts: Iterable[Changes]) -> None:
        """Take one version's changes, all ranks' together, that start from this state."""
        by_tensor: dict[str, list[Changes]] = defaultdict(list)
        for part in parts:
            by_tensor[part.segment.tensor.name].append(part)
        for name, held in by_tensor.items():
            joined = join_parts(held)
            self.digests[name] = add_digests(self.digests[name], digest_change(joined))
            earlier = self.changes.get(name)
            self.changes[name] = joined if earlier is None else compose(earlier, joined)

    def check(self, manifest: Manifest) -> None:
        """DigestMismatchError when this is not the manifest's state, naming the first tensor that differs."""
        check_digests(self.digests, manifest)


def check_digests(digests: dict[str, int], manifest: Manifest) -> None:
    """DigestMismatchError unless `digests` are exactly those of the manifest's tensors."""
    for name, expected in manifest.digests.items():
        actual = format_digest(digests[name]) if name in digests else "missing"
        if actual != expected:
            raise DigestMismatchError(
                f"tensor {name} has digest {actual}, the manifest of version {manifest.version} says {expected}",
                what=name, version=manifest.version, expected=expected, actual=actual,
            )  # fmt: skip
