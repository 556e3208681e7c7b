"""Where the bits of a new version come from when no trainer holds them: another version, or a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from weightline.chain.files.weight_files import WeightFiles, weight_files
from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import Fetcher
from weightline.chain.replay.state import read_state
from weightline.errors import InputError
from weightline.format.manifest import Count
from weightline.types import DTYPE_ITEMSIZE, BitsArray, TensorSpec, bits_dtype

_MAX_HEADER_NBYTES = 256 * 1024 * 1024


class Target(Protocol):
    """A full state that can be read a group of tensors at a time."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor, by name."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        """Flat bits of these tensors."""
        ...


@dataclass(frozen=True, slots=True)
class VersionTarget:
    """The state of a version."""

    chain: Chain
    version: int
    fetcher: Fetcher

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.chain.manifest(self.version).specs

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        return read_state(self.chain, self.version, frozenset(names).__contains__, self.fetcher).bits


@dataclass(frozen=True, slots=True)
class _Entry:
    spec: TensorSpec
    path: Path
    offset: int


@dataclass(slots=True)
class FileTarget:
    """The weights of a checkpoint folder, or of one safetensors file: mapped, not loaded.

    InputError when it cannot be told which files are the model's, when one is missing, cut off or no safetensors file,
    and when an index and its files do not name the same tensors.
    """

    path: Path
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files: WeightFiles = {self.path: None} if self.path.is_file() else weight_files(self.path)
        anywhere = frozenset[str]().union(*(names or () for names in files.values()))
        for path, names in files.items():
            entries = {entry.spec.name: entry for entry in read_header(path)}
            if names is not None:
                _require_indexed(path, frozenset(entries), names, anywhere)
            self._entries |= {name: entry for name, entry in entries.items() if names is None or name in names}
        if not self._entries:
            raise InputError(f"{self.path} holds no tensor: name a checkpoint folder", path=str(self.path))

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: entry.spec for name, entry in self._entries.items()}

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        return {name: self._map(self._entries[name]) for name in names}

    def _map(self, entry: _Entry) -> BitsArray:
        dtype, count = bits_dtype(entry.spec.dtype), entry.spec.num_elements
        if count == 0:
            return np.zeros(0, dtype)
        raw = np.memmap(entry.path, np.uint8, "r", entry.offset, count * dtype.itemsize)
        return raw.view(dtype)


def _require_indexed(path: Path, found: frozenset[str], here: frozenset[str], anywhere: frozenset[str]) -> None:
    """The file holds what the index says that it holds, and nothing that the index says nothing of."""
    if lacking := here - found:
        told = f"lacks tensor {min(lacking)}, which the index says it holds"
    elif unnamed := found - anywhere:
        told = f"holds tensor {min(unnamed)}, which the index does not name"
    else:
        return
    raise InputError(f"{path} {told}: the checkpoint is not whole, save it again", path=str(path))


class _HeaderEntry(BaseModel):
    """A tensor in a safetensors header."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    dtype: str
    shape: Annotated[tuple[Count, ...], Field(strict=False)]
    data_offsets: Annotated[tuple[Count, Count], Field(strict=False)]


_HEADER: TypeAdapter[dict[str, _HeaderEntry]] = TypeAdapter(dict[str, _HeaderEntry])


def read_header(path: Path) -> list[_Entry]:
    """The tensors that a safetensors file announces: 8 bytes of length, then JSON. InputError when it cannot be so."""
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
        entries.append(_Entry(spec, path, start + first))
    return entries


def _parse_header(path: Path, raw: bytes) -> dict[str, _HeaderEntry]:
    try:
        document = json.loads(raw, object_pairs_hook=_without_duplicates)
        if isinstance(document, dict):
            document.pop("__metadata__", None)
        header = _HEADER.validate_python(document)
        "".join(header).encode()  # JSON can spell names that UTF-8 cannot
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a safetensors file: {_told(error)}", path=str(path)) from error
    for name, tensor in header.items():
        if tensor.dtype not in DTYPE_ITEMSIZE:
            raise InputError(f"{path}: tensor {name} has dtype {tensor.dtype}, which no chain holds", path=str(path))
    return header


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _told(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'its header'}: {first['msg']}"
