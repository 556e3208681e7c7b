"""Read an engine's weights back through the mapping: their digests, or their bits.

Legend: N elements of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weightline.codec.digest import add_digests, tensor_digest
from weightline.dtypes import bits_dtype
from weightline.errors import ApplyError
from weightline.serving.engines.vllm.placement import Place, Placement
from weightline.types import BitsArray, TensorSpec

Owned = dict[str, list[int]]


def place_digests(placement: Placement, specs: Mapping[str, TensorSpec]) -> dict[str, list[int]]:
    """By tensor, the digest of every place here: copies of a part, here or elsewhere, must have equal ones."""
    return {name: [_place_digest(place, spec) for place in placement[name]] for name, spec in specs.items()}


def _place_digest(place: Place, spec: TensorSpec) -> int:
    bits_N = _bits(place, spec)
    total = start = 0
    for run in place.box.runs(spec):
        total = add_digests(total, tensor_digest(run, bits_N[start : start + run.length]))
        start += run.length
    return total


def _bits(place: Place, spec: TensorSpec) -> BitsArray:
    """The box's bits in its row-major order; on a CPU a view where they lie side by side."""
    held: BitsArray = place.view().reshape(-1).cpu().numpy().view(bits_dtype(spec.dtype))
    return held


def write_owned_bits(placement: Placement, owned: Owned, spec: TensorSpec, path: Path) -> None:
    """Write the parts that this worker answers for to their positions in a file that holds the whole tensor."""
    try:
        bits_N = np.memmap(path, bits_dtype(spec.dtype), "r+", shape=(spec.num_elements,))
    except OSError as error:
        raise ApplyError(f"{path} cannot be written by an engine's worker: {error.strerror}", path=str(path)) from error
    for number in owned.get(spec.name, []):
        place = placement[spec.name][number]
        strides = [stride * bits_N.itemsize for stride in place.box.strides]
        part = np.lib.stride_tricks.as_strided(bits_N[place.box.offset :], place.box.shape, strides)
        part[...] = _bits(place, spec).reshape(place.box.shape)
