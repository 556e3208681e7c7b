"""Parses the header of a safetensors file: which tensors it holds, and where their bytes lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from weightline.dtypes import DTYPES
from weightline.errors import InputError
from weightline.format.documents import Count
from weightline.types import TensorSpec, is_shape_in_range

_MAX_HEADER_NBYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file: what it is, and the position of its first byte in the file."""

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
        spec = TensorSpec(name, tensor.dtype, _shape_in_elements(path, name, tensor))
        first, stop = tensor.data_offsets
        if not is_shape_in_range(spec.shape):
            raise InputError(f"{path}: tensor {name} has shape {spec.shape}, which no chain holds", path=str(path))
        if stop - first != spec.nbytes or start + stop > file_nbytes:
            raise InputError(f"{path}: tensor {name} is cut off", path=str(path))
        if spec.nbytes and first < end_before:
            raise InputError(f"{path}: tensor {name} overlaps another one", path=str(path))
        end_before = max(end_before, stop)
        entries.append(StoredTensor(spec, path, start + first))
    return entries


def _shape_in_elements(path: Path, name: str, tensor: _HeaderEntry) -> tuple[int, ...]:
    """Returns the shape that torch gives the tensor: a header counts the values of a packed dtype, torch its bytes."""
    num_packed = DTYPES[tensor.dtype].num_packed
    if num_packed == 1:
        return tensor.shape
    if not tensor.shape or tensor.shape[-1] % num_packed:
        raise InputError(
            f"{path}: tensor {name} has shape {list(tensor.shape)}: the last dimension of {tensor.dtype} is a multiple "
            f"of {num_packed}, because {num_packed} values share a byte",
            path=str(path),
        )
    return (*tensor.shape[:-1], tensor.shape[-1] // num_packed)


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
