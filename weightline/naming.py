"""Maps the tensors that a model holds in memory to the names and shapes of its checkpoint.

Writers and followers of a chain share this module. transformers holds a mixture's experts as one tensor and writes one
tensor per expert and projection; other models are only renamed. The chain has the checkpoint's names and shapes, so
that a version equals the output of `save_pretrained` for every engine that reads it. No data are copied: each tensor of
the checkpoint is a range of a held tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from weightline.codec.torch_ops import dtype_code, torch_dtype
from weightline.errors import InputError
from weightline.types import TensorSpec


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointTensor:
    """A tensor of the checkpoint: `spec.num_elements` elements, from `offset` on, of a tensor held in memory."""

    spec: TensorSpec
    """Its dtype may be another one than the held tensor's: it is then published as the cast of what is held."""
    held: torch.Tensor
    """The held tensor: a whole one, a ZeRO-3 parameter, or a DTensor."""
    offset: int = 0


def checkpoint_tensors(model: torch.nn.Module) -> tuple[CheckpointTensor, ...]:
    """Returns every parameter and persistent buffer as in the model's checkpoint, in the model's order. Tied ones once.

    InputError for a model whose `save_pretrained` computes tensors. Reads no weights. Equal on all ranks.
    """
    return as_saved(model, dict(_named_tensors(model)))


def as_saved(model: torch.nn.Module, held: Mapping[str, torch.Tensor]) -> tuple[CheckpointTensor, ...]:
    """Returns the tensors that the model's `save_pretrained` would write, from those that it holds, by its own names.

    InputError when `save_pretrained` computes tensors instead of cutting them from the held ones.
    """
    if not isinstance(model, PreTrainedModel):
        return tuple(CheckpointTensor(spec_of(name, tensor), tensor) for name, tensor in held.items())
    stand_ins = {name: _stand_in(spec_of(name, tensor)) for name, tensor in held.items()}
    order = {_storage(stand_in): (rank, name) for rank, (name, stand_in) in enumerate(stand_ins.items())}
    with _WithoutCopies():
        saved: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(stand_ins))
    found = []
    for name, part in saved.items():
        rank, source = order.get(_storage(part), (-1, ""))
        if rank < 0 or not part.is_contiguous():
            raise InputError(
                f"save_pretrained of {type(model).__name__} computes {name} from the held tensors: weightline only "
                "publishes models whose checkpoint consists of parts of the held tensors",
                tensor=name,
            )
        spec = TensorSpec(name, dtype_code(part.dtype), tuple(part.shape))
        offset = int(part.storage_offset())
        found.append((rank, offset, CheckpointTensor(spec, held[source], offset)))
    return tuple(published for _, _, published in sorted(found, key=lambda row: row[:2]))


def spec_of(name: str, tensor: Any) -> TensorSpec:
    """Returns the spec of the full tensor, partitioned or not. InputError for a dtype that cannot be coded."""
    is_zero3 = hasattr(tensor, "ds_tensor")
    dtype = tensor.ds_tensor.dtype if is_zero3 else tensor.dtype
    shape = tensor.ds_shape if is_zero3 else tensor.shape
    return TensorSpec(name, dtype_code(dtype), tuple(shape))


def without_wrappers(name: str) -> str:
    """Returns a tensor's name without the parts that activation checkpointing and compilation insert."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield without_wrappers(name), parameter
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=module_name, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield without_wrappers(name), buffer


def _stand_in(spec: TensorSpec) -> torch.Tensor:
    """Returns a tensor of that shape and dtype without memory. Views of it still have offsets."""
    return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")


def _storage(tensor: torch.Tensor) -> int:
    """Returns an id of the tensor's storage, which storages without memory have as well."""
    return int(tensor.untyped_storage()._cdata)


class _WithoutCopies(TorchFunctionMode):
    """Disables `contiguous` and `clone` in transformers' conversions, so that the parts they cut stay views."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (torch.Tensor.contiguous, torch.Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))
