"""Compares two versions, a bounded group of tensors at a time, so that no machine has to hold the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.state import read_state
from weightline.codec.capture import capture_tensors
from weightline.errors import InputError
from weightline.format.table import MAX_TABLE_NBYTES
from weightline.types import TensorSpec

#: Bytes of one group's state. Operations hold two states of a group at most.
GROUP_NBYTES = 1024**3
#: Of one group, which is one payload: half of what readers accept.
_MAX_GROUP_TABLE_NBYTES = MAX_TABLE_NBYTES // 2
#: At most, of a number in a table.
_NUMBER_NBYTES = 9


#: Tensors of one group. A group is one payload, whose table has a bound of its own.
GROUP_TENSORS = 1 << 15


def tensor_groups(specs: Iterable[TensorSpec], group_nbytes: int = GROUP_NBYTES) -> Iterator[frozenset[str]]:
    """Yields the names of consecutive tensors that together take at most `group_nbytes`.

    A larger tensor is a group by itself. A group is also small enough to be one payload, because readers bound the
    segments and the table of a payload.
    """
    names: list[str] = []
    nbytes = table_nbytes = 0
    for spec in specs:
        is_full = len(names) == GROUP_TENSORS or table_nbytes > _MAX_GROUP_TABLE_NBYTES
        if names and (is_full or nbytes + spec.nbytes > group_nbytes):
            yield frozenset(names)
            names, nbytes, table_nbytes = [], 0, 0
        names.append(spec.name)
        nbytes += spec.nbytes
        table_nbytes += len(spec.name.encode(errors="replace")) + _NUMBER_NBYTES * (2 + len(spec.shape))
    if names:
        yield frozenset(names)


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """The number of elements of one tensor that differ between two versions."""

    name: str
    num_changed: int
    num_elements: int


def diff_versions(chain: Chain, a: int, b: int, group_nbytes: int = GROUP_NBYTES) -> list[TensorDiff]:
    """Returns, for every tensor, how many elements of the two versions differ in bits.

    Tensors with equal digests are not read. InputError when the versions hold different tensors.
    """
    at_a, at_b = chain.digests(a), chain.digests(b)
    if at_a.layout != at_b.layout:
        raise InputError(f"versions {a} and {b} of {chain.url} hold different tensors", versions=(a, b))
    specs = at_a.layout.by_name
    counts = dict.fromkeys(specs, 0)
    with fetching(chain.store) as fetcher:
        for names in tensor_groups((specs[name] for name in at_a.differing(at_b)), group_nbytes):
            old = read_state(chain, a, names.__contains__, fetcher)
            new = read_state(chain, b, names.__contains__, fetcher)
            for changes in capture_tensors(new.specs.values(), old.bits, new.bits):
                counts[changes.segment.tensor.name] = changes.num_changed
    return [TensorDiff(name, count, specs[name].num_elements) for name, count in counts.items()]
