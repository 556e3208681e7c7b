"""Determines which elements of which tensors this rank holds, and reads them without any collective.

ZeRO-3: `ds_tensor` is rank r's slice [r * ceil(N / W), ...) of the row-major flattened parameter, with W and r those of
its own process group; elements past the parameter's end are uninitialized padding. Plain data parallelism and
replicated buffers: every rank holds all elements, so each publishes an even slice. FSDP2: a DTensor's local rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from weightline.codec.torch_ops import torch_dtype
from weightline.errors import InputError
from weightline.naming import CheckpointTensor, checkpoint_tensors, spec_of
from weightline.types import Segment, TensorSpec


@dataclass(frozen=True, slots=True)
class Shard:
    """A segment and a function that reads its present elements, flat, on the device where training holds them.

    The elements have the dtype of the segment's tensor. Where training holds another one, they are a copy.
    """

    segment: Segment
    read: Callable[[], torch.Tensor]


def partition_of(model: torch.nn.Module, rank: int, world_size: int) -> tuple[Shard, ...]:
    """Returns this rank's shards of every parameter and persistent buffer, in the model's order. Tied ones appear once.

    The shards of all ranks cover each tensor exactly once. A rank that holds nothing of a tensor has no shard of it.
    """
    return shards_of(checkpoint_tensors(model), rank, world_size)


def shards_of(tensors: Iterable[CheckpointTensor], rank: int, world_size: int) -> tuple[Shard, ...]:
    """Returns this rank's shards of these tensors, in their order.

    A held tensor that is published as several tensors is partitioned as a whole, and then cut.
    """
    shards = (_cut(_shard(published, rank, world_size), published) for published in tensors)
    return tuple(shard for shard in shards if shard.segment.length > 0)


def _shard(published: CheckpointTensor, rank: int, world_size: int) -> Shard:
    """Returns the part of the held tensor that this rank publishes."""
    held = published.held
    spec = spec_of(published.spec.name, held)
    if hasattr(held, "ds_tensor"):
        return _zero3_shard(spec, held)
    if isinstance(held, DTensor):
        return _fsdp2_shard(spec, held)
    start, length = even_slice(spec.num_elements, rank, world_size)
    return Shard(Segment(spec, start, length), lambda: held.detach().reshape(-1)[start : start + length])


def _cut(shard: Shard, published: CheckpointTensor) -> Shard:
    """Returns the part of a held tensor's shard that belongs to one published tensor, cast to its dtype.

    It is empty when there is none.
    """
    spec, offset, held = published.spec, published.offset, shard.segment
    start, stop = max(held.start, offset), min(held.stop, offset + spec.num_elements)
    if stop <= start:
        return Shard(Segment(spec, 0, 0), shard.read)
    first, last, dtype = start - held.start, stop - held.start, torch_dtype(spec.dtype)
    return Shard(Segment(spec, start - offset, stop - start), lambda: shard.read()[first:last].to(dtype))


def _zero3_shard(spec: TensorSpec, parameter: Any) -> Shard:
    partition_numel = parameter.ds_tensor.ds_numel
    start = min(partition_numel * parameter.ds_zero_partition_rank, spec.num_elements)
    length = min(partition_numel, spec.num_elements - start)

    def read() -> torch.Tensor:
        # Read anew at every sync: DeepSpeed may swap the tensor object. Never p.data, which is empty between gathers.
        held = parameter.ds_tensor
        if held.ds_numel != partition_numel or held.numel() < length:
            raise InputError(
                f"the ZeRO-3 partition of {spec.name} is not in memory (offloaded to NVMe?): weightline cannot read it",
                tensor=spec.name,
            )
        local: torch.Tensor = held.detach().reshape(-1)[:length]
        return local

    return Shard(Segment(spec, start, length), read)


def _fsdp2_shard(spec: TensorSpec, parameter: DTensor) -> Shard:
    """Returns the local rows of a parameter under `fully_shard`. Of several replicas (HSDP), the first publishes."""
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate() or [0] * mesh.ndim
    is_publisher = True
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Replicate):
            is_publisher &= coordinate[axis] == 0
        elif not (isinstance(placement, ShardPlacement) and placement.dim == 0):
            raise InputError(
                f"{spec.name} is placed as {placement} on the device mesh: weightline reads shards along dimension 0",
                tensor=spec.name,
            )
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
    row = spec.num_elements // spec.shape[0] if spec.shape and spec.shape[0] else 0
    start, length = (offset[0] * row, math.prod(shape)) if spec.shape else (0, 1)
    # The optimizer may swap the local tensor: read it anew at every sync.
    return Shard(Segment(spec, start, length if is_publisher else 0), lambda: parameter.to_local().detach().reshape(-1))


def even_slice(num_elements: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns (start, length) of the rank's slice when `num_elements` are split evenly. The last slices are shorter."""
    size = -(-num_elements // world_size)
    start = min(size * rank, num_elements)
    return start, min(size, num_elements - start)


def refuse_fsdp1(model: torch.nn.Module) -> None:
    """InputError for a model that FSDP 1 holds: its parameters are flat pieces that name neither shape nor place."""
    wrapped = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    if wrapped or any(_is_fsdp_flattened(parameter) for parameter in model.parameters()):
        raise InputError(
            "FSDP 1 (FullyShardedDataParallel) is not supported: weightline reads the shards of FSDP 2. Set "
            'fsdp_version: 2 in accelerate\'s configuration, or fsdp_config={"version": 2} in the TrainingArguments',
            field="fsdp_version",
        )
