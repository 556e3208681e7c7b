"""The dtype of a stage's start weights, and the float32 tensors among them that loading for training would round.

ZeRO-3 makes every floating-point tensor of a model in the training dtype before the checkpoint is read into it, and
`from_pretrained` rounds what the model's class does not name. Router biases lose most of their values so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from weightline.codec.torch_ops import torch_dtype
from weightline.dtypes import DtypeSetting
from weightline.naming import CheckpointTensor, checkpoint_tensors
from weightline.trainer.published_dtype import ROUTER_BIAS, kept_as_held

_WIDE_OR_HALF = ("F64", "F32", "F16", "BF16")


def held_dtype(folder: Path) -> str | None:
    """Returns the safetensors code of the dtype that most floating-point elements of the folder's weights have."""
    counts: Counter[str] = Counter()
    for _, header in _headers(folder):
        for info in header.values():
            if info["dtype"] in _WIDE_OR_HALF:
                counts[info["dtype"]] += prod(info["shape"])
    return counts.most_common(1)[0][0] if counts else None


def training_dtype(setting: DtypeSetting, folder: Path) -> torch.dtype:
    """Returns the dtype in which a stage loads its weights and computes: bf16, or float32, which rounds nothing.

    `setting` is the recipe's. Without a dtype in it, weights that are held in bf16 are trained in bf16; others, whose
    bits bf16 does not hold, are trained in float32.
    """
    if setting in ("auto", "held"):
        return torch.float32 if held_dtype(folder) in ("F64", "F32", "F16") else torch.bfloat16
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


@dataclass(frozen=True, slots=True)
class Float32Tensors:
    """What became of tensors that the start model holds in float32, and that were rounded when they were loaded."""

    restored: tuple[str, ...]
    """They have their float32 values again."""
    rounded: tuple[str, ...]
    """They are trained in the narrower dtype."""


def restore_float32(model: torch.nn.Module, folder: Path) -> Float32Tensors:
    """Gives buffers and router biases that were rounded when they were loaded their float32 values back.

    Called before the trainer wraps the model. A parameter becomes a buffer, which ZeRO-3 neither partitions nor
    casts; `save_pretrained` writes it under the same name. Safe to repeat. Names are those of the checkpoint.
    """
    narrow = {tensor.spec.name: tensor for tensor in checkpoint_tensors(model) if tensor.spec.dtype in ("F16", "BF16")}
    restored: list[str] = []
    rounded: list[str] = []
    for path, header in _headers(folder):
        names = [name for name, info in header.items() if name in narrow and info["dtype"] == "F32"]
        with safe_open(path, framework="pt") as file:
            for name in names:
                tensor = narrow[name]
                is_restored = _is_untrained(tensor) and _replace(model, tensor, file.get_tensor(name))
                (restored if is_restored else rounded).append(name)
    return Float32Tensors(tuple(restored), tuple(rounded))


def uncast_names(model: torch.nn.Module) -> frozenset[str]:
    """Returns the names, in the checkpoint, of the tensors that a cast of the model's weights leaves as they are."""
    kept = kept_as_held(model)
    return frozenset(tensor.spec.name for tensor in checkpoint_tensors(model) if id(tensor.held) in kept)


def cast_dtype(setting: DtypeSetting) -> torch.dtype | None:
    """Returns the dtype to which a recipe's setting casts the start model, or None where it keeps what is held."""
    return None if setting in ("auto", "held") else getattr(torch, setting)


def is_cast(code: str, dtype: torch.dtype | None) -> bool:
    """Returns whether a tensor of this safetensors dtype is cast when the start model is cast to `dtype`."""
    return dtype is not None and code in _WIDE_OR_HALF and torch_dtype(code) != dtype


def _is_untrained(tensor: CheckpointTensor) -> bool:
    """Returns whether it is a buffer, or a router's bias that no gradient reaches.

    Such a bias only decides which experts are taken. Architectures freeze it; `from_pretrained` forgets that.
    """
    return not isinstance(tensor.held, torch.nn.Parameter) or ROUTER_BIAS.search(tensor.spec.name) is not None


def _replace(model: torch.nn.Module, tensor: CheckpointTensor, value: torch.Tensor) -> bool:
    """Puts the value in the place of the held tensor. Returns whether it is the whole of it."""
    held: Any = tensor.held
    shape = getattr(held, "ds_shape", held.shape)
    for module in model.modules():
        group = module._parameters if isinstance(held, torch.nn.Parameter) else module._buffers
        name = next((name for name, other in group.items() if other is held), None)
        if name is not None and prod(shape) == value.numel():
            del group[name]
            module.register_buffer(name, value.reshape(shape).to(held.device))
            return True
    return False


def _headers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields each weights file of the folder with what its header says of its tensors."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        yield path, header
