"""Finds the files of a checkpoint folder that hold its weights, and parses the headers of those files.

It chooses the files that the loaders of transformers and peft choose. Where loaders would differ, it is an InputError.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from weightline.dtypes import DTYPES
from weightline.errors import InputError
from weightline.format.manifest import Count
from weightline.types import TensorSpec

_WHOLE = "model.safetensors"

_ADAPTER = "adapter_model.safetensors"

_INDEX_SUFFIX = ".safetensors.index.json"

#: The tensors to read from each file; None means all tensors of the file.
WeightFiles = dict[Path, frozenset[str] | None]

_MAX_HEADER_NBYTES = 256 * 1024 * 1024

#: The file that makes a folder an adapter's (peft).
ADAPTER_CONFIG = "adapter_config.json"


class _Index(BaseModel):
    """The part of a safetensors index that is read."""

    model_config = ConfigDict(frozen=True, strict=True)

    weight_map: dict[str, str]


def weight_files(folder: Path) -> WeightFiles:
    """Returns the weight files of a checkpoint folder, and the tensors to read from each.

    Chooses an adapter's file if there is an adapter's configuration, else the files that the index names, else
    model.safetensors, else the only safetensors file. InputError when nothing is found, when a file that the index
    names is missing, and when the choice is ambiguous.
    """
    if (folder / ADAPTER_CONFIG).is_file() and (folder / _ADAPTER).is_file():
        return {folder / _ADAPTER: None}
    index = _index_of(folder)
    if index is not None:
        return _indexed(folder, index)
    found = sorted(folder.glob("*.safetensors"))
    chosen = [path for path in found if path.name == _WHOLE] or found
    if not chosen:
        raise InputError(f"{folder} holds no *.safetensors: name a checkpoint folder", path=str(folder))
    if len(chosen) > 1:
        raise InputError(
            f"{folder} holds {len(chosen)} files of weights ({chosen[0].name}, {chosen[1].name}, ...) and no "
            f"model{_INDEX_SUFFIX}: save the model again with its index, or leave only one file there",
            path=str(folder),
        )
    return {chosen[0]: None}


def _index_of(folder: Path) -> Path | None:
    """Returns the index of the folder: the model's own one, else one of another name without a model.safetensors."""
    own = folder / f"model{_INDEX_SUFFIX}"
    if own.is_file() or (folder / _WHOLE).is_file():
        return own if own.is_file() else None
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise InputError(f"{folder} holds {names}: leave only the index of the model", path=str(folder))
    return found[0] if found else None


def _indexed(folder: Path, index: Path) -> WeightFiles:
    try:
        weight_map = _Index.model_validate_json(index.read_bytes()).weight_map
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"]
        raise InputError(f"{index} is not an index of weights: {what}", path=str(index)) from error
    names: dict[str, set[str]] = defaultdict(set)
    for name, file_name in weight_map.items():
        names[file_name].add(name)
    for file_name in sorted(names):
        if Path(file_name).name != file_name or not (folder / file_name).is_file():
            raise InputError(
                f"{index} names {file_name!r}, which {folder} does not hold: the checkpoint is not whole",
                path=str(folder), missing=file_name,
            )  # fmt: skip
    if (folder / _WHOLE).is_file() and _WHOLE not in names:
        raise InputError(
            f"{folder} holds {_WHOLE} and {index.name}, which names other files: remove the one that is outdated",
            path=str(folder),
        )
    return {folder / file_name: frozenset(names[file_name]) for file_name in sorted(names)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    spec: TensorSpec
    path: Path
    offset: int


class _HeaderEntry(BaseModel):
    """A tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[Count, ...], Field(strict=False)]
    data_offsets: Annotated[tuple[Count, Count], Field(strict=False)]


_HEADER: TypeAdapter[dict[str, _HeaderEntry]] = TypeAdapter(dict[str, _HeaderEntry])


def read_header(path: Path) -> list[StoredTensor]:
    """Returns the tensors in a safetensors file's header: 8 bytes of length, then JSON. InputError for a broken one."""
    file_nbytes = path.stat().st_size
    with path.open("rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_nbytes <= min(_MAX_HEADER_NBYTES, file_nbytes - 8):
            raise InputError(f"{path} is not a safetensors file", path=str(path))
        header = _parse_header(path, file.read(header_nbytes))
    start = 8 + header_nbytes
    end_before = 0
    entries = []
    for name, tensor in sorted(header.items(), key=lambda item: item[1].data_offsets):
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        first, stop = tensor.data_offsets
        if stop - first != spec.nbytes or start + stop > file_nbytes:
            raise InputError(f"{path}: tensor {name} is cut off", path=str(path))
        if spec.nbytes and first < end_before:
            raise InputError(f"{path}: tensor {name} overlaps another one", path=str(path))
        end_before = max(end_before, stop)
        entries.append(StoredTensor(spec, path, start + first))
    return entries


def _parse_header(path: Path, raw: bytes) -> dict[str, _HeaderEntry]:
    try:
        document = json.loads(raw, object_pairs_hook=_without_duplicates)
        if isinstance(document, dict):
            document.pop("__metadata__", None)
        header = _HEADER.validate_python(document)
        "".join(header).encode()  # JSON can escape lone surrogates, which UTF-8 cannot encode
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: {_reason(error)}", path=str(path)) from error
    for name, tensor in header.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {tensor.dtype}, which no chain holds", path=str(path))
    return header


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'its header'}: {first['msg']}"
