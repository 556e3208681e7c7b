"""Where two versions differ."""

from __future__ import annotations

from dataclasses import dataclass

from weightline.chain.files.groups import GROUP_NBYTES, tensor_groups
from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.state import read_state
from weightline.codec.capture import capture
from weightline.errors import InputError
from weightline.types import Segment


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """How much of one tensor differs."""

    name: str
    num_changed: int
    num_elements: int


def diff_versions(chain: Chain, a: int, b: int, group_nbytes: int = GROUP_NBYTES) -> list[TensorDiff]:
    """Every tensor of the two versions, with how many elements differ in bits. Equal digests are not read again."""
    at_a, at_b = chain.manifest(a), chain.manifest(b)
    if at_a.specs != at_b.specs:
        raise InputError(f"versions {a} and {b} of {chain.url} hold different tensors", versions=(a, b))
    differing = [spec for name, spec in at_a.specs.items() if at_a.digests[name] != at_b.digests[name]]
    counts = dict.fromkeys(at_a.specs, 0)
    with fetching(chain.store) as fetcher:
        for names in tensor_groups(differing, group_nbytes):
            old = read_state(chain, a, names.__contains__, fetcher)
            new = read_state(chain, b, names.__contains__, fetcher)
            for name in names:
                spec = at_a.specs[name]
                segment = Segment(spec, 0, spec.num_elements)
                counts[name] = capture(segment, old.bits[name], new.bits[name]).num_changed
    return [TensorDiff(name, count, at_a.specs[name].num_elements) for name, count in counts.items()]
