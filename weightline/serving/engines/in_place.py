"""Reads and writes a torch model's weights as flat bits, in place: the storage stays, on any device, for any dtype.

Legend: N elements of a tensor, K changed ones.
"""

from __future__ import annotations

import numpy as np
import torch

from weightline.codec.torch_ops import signed_view
from weightline.dtypes import bits_dtype, signed_dtype
from weightline.errors import ApplyError, InputError
from weightline.naming import CheckpointTensor, as_saved
from weightline.types import BitsArray, Changes, PositionArray, TensorSpec


class LiveWeights:
    """The parameters and persistent buffers of a model, by their checkpoint names. A tied tensor has several names.

    A tensor that the checkpoint stores in parts (a mixture's experts) appears as its parts, each a range of the tensor
    that the model computes with. ApplyError for a model whose tensors cannot be written in place: not contiguous, not
    materialized, or computed from the checkpoint's.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._flat: dict[str, torch.Tensor] = {}
        self.specs: dict[str, TensorSpec] = {}
        for published in _published(model):
            name, start = published.spec.name, published.offset
            self._flat[name] = _flat_bits(name, published.held)[start : start + published.spec.num_elements]
            self.specs[name] = published.spec

    def read_bits(self, name: str) -> BitsArray:
        """Returns all N elements of a tensor: a view on a CPU, a copy from other devices."""
        return self._to_host(name, self._flat[name])

    def read_elements(self, name: str, positions_K: PositionArray) -> BitsArray:
        """Returns a copy of the K elements at the positions."""
        return self._to_host(name, self._flat[name][self._on_device(name, positions_K)])

    def scatter(self, changes: Changes) -> None:
        """Writes the new bits of one whole-tensor Changes. Safe to repeat.

        ApplyError when they do not fit the tensor, before anything is written, or when torch cannot write them.
        """
        spec = changes.segment.tensor
        if self.specs.get(spec.name) != spec or changes.segment.length != spec.num_elements:
            raise ApplyError(f"changes of {spec} do not fit {self.specs.get(spec.name)}", tensor=spec.name)
        if not changes.num_changed:
            return
        # torch checks the bounds of an index on a CPU. On other devices a kernel asserts, which breaks the device.
        if changes.positions_K[0] < 0 or changes.positions_K[-1] >= spec.num_elements:
            raise ApplyError(f"changes of {spec.name} reach beyond its {spec.num_elements} elements", tensor=spec.name)
        new_K = self._on_device(spec.name, changes.new_K.view(signed_dtype(spec.dtype)))
        try:
            self._flat[spec.name].index_copy_(0, self._on_device(spec.name, changes.positions_K), new_K)
        except RuntimeError as error:
            raise ApplyError(f"{spec.name} could not be written: {error}", tensor=spec.name) from error

    def _on_device(self, name: str, array: np.ndarray[tuple[int], np.dtype[np.signedinteger]]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._flat[name].device)

    def _to_host(self, name: str, bits: torch.Tensor) -> BitsArray:
        array: BitsArray = bits.cpu().numpy().view(bits_dtype(self.specs[name].dtype))
        return array


def _published(model: torch.nn.Module) -> tuple[CheckpointTensor, ...]:
    try:
        return as_saved(model, model.state_dict(keep_vars=True))
    except InputError as error:
        raise ApplyError(f"the weights cannot be written in place: {error}", **error.facts) from error


def _flat_bits(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor's own storage as a flat tensor of signed integers of the same width. ApplyError."""
    if tensor.is_meta:
        raise ApplyError(f"{name} has no data (offloaded?): it cannot be written in place", tensor=name)
    if not tensor.is_contiguous():
        raise ApplyError(f"{name} is not contiguous: it cannot be written in place", tensor=name)
    return signed_view(tensor)
