"""Sources of weights for a new version that is made without a trainer: another version, or a checkpoint folder."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

import numpy as np

from weightline.chain.files.header import StoredTensor, read_header
from weightline.chain.files.weight_files import WeightFiles, weight_files
from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import Fetcher
from weightline.chain.replay.state import read_state
from weightline.dtypes import bits_dtype
from weightline.errors import InputError
from weightline.types import BitsArray, TensorSpec

#: Maps of one source that may be alive at a time. Two sources and all else fit into 256 descriptors.
_MAX_MAPS = 64


class WeightSource(Protocol):
    """A full state that can be read a group of tensors at a time."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Returns the spec of every tensor, by name."""
        ...

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        """Returns the flat bits of these tensors, by name."""
        ...


@dataclass(frozen=True, slots=True)
class VersionSource:
    """The state of a version."""

    chain: Chain
    version: int
    fetcher: Fetcher

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.chain.layout(self.version).by_name

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        return read_state(self.chain, self.version, frozenset(names).__contains__, self.fetcher).bits


@dataclass(slots=True)
class FolderSource:
    """The weights of a checkpoint folder, or of one safetensors file. Files are mapped into memory, not loaded.

    InputError when the choice of files is ambiguous, when one is missing, truncated or no safetensors file, and when
    an index and its files do not name the same tensors.
    """

    path: Path
    _entries: dict[str, StoredTensor] = field(default_factory=dict)
    _maps: WeakValueDictionary[Path, mmap.mmap] = field(default_factory=WeakValueDictionary)

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

    @property
    def file_names(self) -> frozenset[str]:
        """The names of the files that the tensors are read from."""
        return frozenset(entry.path.name for entry in self._entries.values())

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        return {name: self._read(self._entries[name]) for name in names}

    def _read(self, entry: StoredTensor) -> BitsArray:
        """Returns a tensor's bits: a view of its file's map, or a copy of bits that no array could be a view of."""
        dtype, nbytes = bits_dtype(entry.spec.dtype), entry.spec.nbytes
        if nbytes == 0:
            return np.zeros(0, dtype)
        mapped = self._map(entry.path)
        if mapped is None:
            return np.fromfile(entry.path, dtype, entry.spec.num_elements, offset=entry.offset)
        raw = np.frombuffer(mapped, np.uint8, nbytes, entry.offset)
        is_aligned = entry.offset % dtype.itemsize == 0  # safetensors asks for no alignment
        return (raw if is_aligned else raw.copy()).view(dtype)

    def _map(self, path: Path) -> mmap.mmap | None:
        """Returns the file's map, which all its tensors share and which lives as long as one of them does.

        A map holds a file descriptor: None when so many are alive that the process could run out of them.
        """
        mapped = self._maps.get(path)
        if mapped is None and len(self._maps) < _MAX_MAPS:
            with path.open("rb") as file:
                mapped = self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped


def _require_indexed(path: Path, found: frozenset[str], here: frozenset[str], anywhere: frozenset[str]) -> None:
    """InputError unless the file holds every tensor that the index assigns to it, and none that the index omits."""
    if lacking := here - found:
        problem = f"lacks tensor {min(lacking)}, which the index says it holds"
    elif unnamed := found - anywhere:
        problem = f"holds tensor {min(unnamed)}, which the index does not name"
    else:
        return
    raise InputError(f"{path} {problem}: the checkpoint is not whole, save it again", path=str(path))
