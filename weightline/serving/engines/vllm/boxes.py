"""Boxes of a tensor's elements, and who answers for which: pure, free of torch.

Legend: N elements of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from weightline.errors import ApplyError
from weightline.types import Segment, TensorSpec


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """The positions `offset + i * strides[0] + j * strides[1] ..` for i, j, .. within `shape`; strides fall.

    A slice of rows, of columns, one expert of many: whatever a loader narrows a tensor to.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def checked(self, spec: TensorSpec) -> Box:
        """Itself, when it lies within the tensor and every position in it has one index; ApplyError otherwise."""
        reach = self.offset
        below = 0
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if stride <= below:
                raise ApplyError(f"a loader takes {spec.name} apart in a way that is no box", tensor=spec.name)
            below += (size - 1) * stride
        if reach < 0 or reach + below >= spec.num_elements:
            raise ApplyError(f"a loader reaches beyond {spec}", tensor=spec.name)
        return self

    def runs(self, spec: TensorSpec) -> Iterator[Segment]:
        """The box as stretches of consecutive positions, in row-major order of the box."""
        length, axes = 1, len(self.shape)
        while axes and self.strides[axes - 1] == length:
            length *= self.shape[axes - 1]
            axes -= 1
        for index in np.ndindex(self.shape[:axes]):
            start = self.offset + sum(i * stride for i, stride in zip(index, self.strides, strict=False))
            yield Segment(spec, start, length)

    def to_json(self) -> list[object]:
        return [self.offset, list(self.shape), list(self.strides)]


def box_from_json(raw: Sequence[object]) -> Box:
    """Inverse of `Box.to_json`."""
    offset, shape, strides = raw
    assert isinstance(offset, int)
    assert isinstance(shape, Sequence)
    assert isinstance(strides, Sequence)
    return Box(offset, tuple(int(n) for n in shape), tuple(int(n) for n in strides))


#: For every rank and tensor, the numbers of its boxes that the rank answers for.
Owned = list[dict[str, list[int]]]


def share_out(specs: Mapping[str, TensorSpec], held: Sequence[Mapping[str, Sequence[Box]]]) -> Owned:
    """Who answers for what: of equal boxes (replicas, copies) the first, in order of ranks.

    ApplyError unless, of every tensor, each element is in exactly one box of those that are answered for.
    """
    owned: Owned = [{} for _ in held]
    for name, spec in specs.items():
        chosen: set[Box] = set()
        for rank, boxes_of in enumerate(held):
            for number, box in enumerate(boxes_of.get(name, ())):
                if box not in chosen:
                    chosen.add(box)
                    owned[rank].setdefault(name, []).append(number)
        _require_each_once(spec, chosen)
    return owned


def _require_each_once(spec: TensorSpec, boxes: set[Box]) -> None:
    if not boxes and spec.num_elements:
        raise ApplyError(f"the engine holds no part of {spec}: a refresh of it would be lost", tensor=spec.name)
    if len(boxes) == 1 and next(iter(boxes)).num_elements == spec.num_elements:
        return  # within the tensor, each position once, and as many as there are
    counts_N = np.zeros(spec.num_elements, np.uint8)
    for box in boxes:
        strides = [stride * counts_N.itemsize for stride in box.strides]
        counts = np.lib.stride_tricks.as_strided(counts_N[box.offset :], box.shape, strides)
        counts += 1
    if not (counts_N == 1).all():
        position = int((counts_N != 1).argmax())
        raise ApplyError(
            f"element {position} of {spec.name} is in {counts_N[position]} places of the engine that do not agree on "
            "its part: it cannot be refreshed in place",
            tensor=spec.name, position=position,
        )  # fmt: skip
