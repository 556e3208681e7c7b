"""Tensors a bounded group at a time: no operation on a chain needs a machine that holds the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightline.types import TensorSpec

#: Bytes of one group's state. Operations hold two states of a group at most.
GROUP_NBYTES = 1024**3


def tensor_groups(specs: Iterable[TensorSpec], group_nbytes: int = GROUP_NBYTES) -> Iterator[frozenset[str]]:
    """Names of consecutive tensors that together take `group_nbytes` or less; a larger tensor is a group by itself."""
    names: list[str] = []
    nbytes = 0
    for spec in specs:
        if names and nbytes + spec.nbytes > group_nbytes:
            yield frozenset(names)
            names, nbytes = [], 0
        names.append(spec.name)
        nbytes += spec.nbytes
    if names:
        yield frozenset(names)
