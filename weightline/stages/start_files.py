"""A checkpoint's files as a start model in bf16, one tensor in memory at a time: no machine ever holds the model.

What is bf16 already is taken as it is; other floating-point tensors are cast, file by file. Ranks then load the folder
under ZeRO-3, each keeping its own part.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

#: What belongs to a model beside its weights: config, tokenizer, chat template, code of its own.
_SUFFIXES = frozenset({".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"})
_CONFIG = "config.json"
HUB_PATTERNS = ["*.safetensors", *(f"*{suffix}" for suffix in sorted(_SUFFIXES))]


def has_safetensors(source: Path) -> bool:
    """Whether the folder's weights can be taken file by file."""
    return (source / _CONFIG).is_file() and any(source.glob("*.safetensors"))


def take_files(source: Path, folder: Path) -> None:
    """Make `folder` the model of `source`, its weights in bf16. Hard links where nothing changes and disks allow it.

    Safe to repeat; a crash leaves a folder to be written again. OSError when there is no room, ValueError or
    safetensors' own error for files that are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.suffix == ".safetensors":
            _take_weights(path.resolve(), folder / path.name)
        elif path.name == _CONFIG:
            (folder / _CONFIG).write_text(_with_bf16(path.read_text(encoding="utf-8")), encoding="utf-8")
        elif path.suffix in _SUFFIXES and path.is_file():
            shutil.copyfile(path, folder / path.name)


def _take_weights(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    with safe_open(source, framework="pt") as file:
        if not any(_needs_cast(file.get_slice(name).get_dtype()) for name in file.keys()):  # noqa: SIM118 - no mapping
            _link_or_copy(source, target)
            return
        tensors = dict(_cast(file))
    save_file(tensors, target, metadata={"format": "pt"})


def _cast(file: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name in file.keys():  # noqa: SIM118 - no mapping
        tensor = file.get_tensor(name)
        yield name, tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _needs_cast(dtype: str) -> bool:
    return dtype in ("F64", "F32", "F16")


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _with_bf16(config: str) -> str:
    document = json.loads(config)
    document.pop("torch_dtype", None)
    return json.dumps(document | {"dtype": "bfloat16"}, indent=2) + "\n"
