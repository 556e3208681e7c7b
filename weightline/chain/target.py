"""Where the bits of a new version come from when no trainer holds them: another version, or a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from weightline.chain.fetch import Fetcher
from weightline.chain.history import Chain
from weightline.chain.state import read_state
from weightline.errors import InputError
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
    """The weights of a checkpoint folder (every *.safetensors in it) or of one such file: mapped, not loaded."""

    path: Path
    _entries: dict[str, _Entry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.path} holds no *.safetensors: name a checkpoint folder", path=str(self.path))
        for path in files:
            for entry in _read_header(path):
                if entry.spec.name in self._entries:
                    raise InputError(f"{self.path}: tensor {entry.spec.name} stands in two files", path=str(path))
                self._entries[entry.spec.name] = entry

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


def _read_header(path: Path) -> Iterable[_Entry]:
    """The safetensors header: 8 bytes of length, then JSON. InputError when the file is none or is cut off."""
    file_nbytes = path.stat().st_size
    with path.open("rb") as file:
        header_nbytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_nbytes <= min(_MAX_HEADER_NBYTES, file_nbytes - 8):
            raise InputError(f"{path} is not a safetensors file", path=str(path))
        try:
            header = json.loads(file.read(header_nbytes))
        except ValueError as error:
            raise InputError(f"{path} is not a safetensors file: {error}", path=str(path)) from error
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        if tensor["dtype"] not in DTYPE_ITEMSIZE:
            raise InputError(f"{path}: tensor {name} has dtype {tensor['dtype']}, which no chain holds", path=str(path))
        spec = TensorSpec(name, tensor["dtype"], tuple(tensor["shape"]))
        start, stop = tensor["data_offsets"]
        if stop - start != spec.nbytes or 8 + header_nbytes + stop > file_nbytes:
            raise InputError(f"{path}: tensor {name} is cut off", path=str(path))
        yield _Entry(spec, path, 8 + header_nbytes + start)
