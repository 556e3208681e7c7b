"""Sources of weights for a new version that is made without a trainer: another version, or a checkpoint folder.

A source is read a tile at a time, so that memory grows neither with the model nor, for a folder, with a tensor.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from weightline.chain.files.header import StoredTensor, read_header
from weightline.chain.files.weight_files import WeightFiles, weight_files
from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import STATE_NBYTES, spec_groups
from weightline.chain.replay.fetch import Fetcher
from weightline.chain.replay.plan import Routes
from weightline.chain.replay.state import read_state
from weightline.codec.coding import num_cpus, ordered_map_in_batches
from weightline.codec.digest import add_digests, tensor_digest
from weightline.codec.pieces import tiles_of
from weightline.dtypes import bits_dtype
from weightline.errors import InputError
from weightline.types import BitsArray, Segment, TensorSpec, whole

Tile = tuple[Segment, BitsArray]


class WeightSource(Protocol):
    """A full state that can be read a tile at a time."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Returns the spec of every tensor, by name."""
        ...

    def known_digests(self, specs: Sequence[TensorSpec], before: Mapping[str, int]) -> dict[str, int]:
        """Returns the state digests of those of these tensors that are cheap to know, by name.

        `before`: digests of an earlier state, with which the caller compares them.
        """
        ...

    def tiles(self, specs: Sequence[TensorSpec]) -> Iterator[Tile]:
        """Yields the tiles of these tensors, tensor after tensor, with their bits. An empty tensor has none."""
        ...


@dataclass(slots=True)
class VersionSource:
    """The state of a version. It is replayed for a bounded group of tensors at a time, all by the same path."""

    chain: Chain
    version: int
    fetcher: Fetcher
    _routes: Routes = field(init=False)

    def __post_init__(self) -> None:
        self._routes = Routes(self.chain)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.chain.layout(self.version).by_name

    def known_digests(self, specs: Sequence[TensorSpec], before: Mapping[str, int]) -> dict[str, int]:
        digests = self.chain.digests(self.version)
        return {spec.name: digests[spec.name] for spec in specs}

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        """Returns the flat bits of these tensors, by name."""
        state = read_state(self.chain, self.version, frozenset(names).__contains__, self.fetcher, self._routes)
        return state.bits

    def tiles(self, specs: Sequence[TensorSpec]) -> Iterator[Tile]:
        for group in spec_groups(specs, STATE_NBYTES):
            bits = self.read(spec.name for spec in group)
            for spec in group:
                yield from tiles_in(spec, bits.pop(spec.name))


def tiles_in(spec: TensorSpec, bits_N: BitsArray) -> Iterator[Tile]:
    """Yields the tiles of a tensor, with views of its bits."""
    for tile in tiles_of(whole(spec)):
        yield tile, bits_N[tile.start : tile.stop]


@dataclass(slots=True)
class FolderSource:
    """The weights of a checkpoint folder, or of one safetensors file.

    InputError when the choice of files is ambiguous, when one is missing, truncated or no safetensors file, and when
    an index and its files do not name the same tensors.
    """

    path: Path
    _entries: dict[str, StoredTensor] = field(default_factory=dict)
    _finds_equal: bool = True

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

    def known_digests(self, specs: Sequence[TensorSpec], before: Mapping[str, int]) -> dict[str, int]:
        """Reads the tensors if some of those before kept their digests: if all changed, all others most likely did.

        So a folder in which everything changed is read once, and one that shares tensors with the version before costs
        no replay of these.
        """
        if not self._finds_equal:
            return {}
        found = self.digests(specs)
        self._finds_equal = any(before[name] == digest for name, digest in found.items())
        return found

    def digests(self, specs: Sequence[TensorSpec]) -> dict[str, int]:
        """Returns the state digests of these tensors, by name. Reads them, on all CPUs."""
        found = {spec.name: 0 for spec in specs}
        tiles = self.tiles(specs)
        parts = ordered_map_in_batches(_digest_of_tile, tiles, num_cpus(), size_of=lambda tile: tile[0].length)
        for tile, digest in parts:
            found[tile.tensor.name] = add_digests(found[tile.tensor.name], digest)
        return found

    def read(self, names: Iterable[str]) -> dict[str, BitsArray]:
        """Returns the flat bits of these tensors, by name."""
        with _reading() as read:
            return {name: read(self._entries[name], whole(self._entries[name].spec)) for name in names}

    def tiles(self, specs: Sequence[TensorSpec]) -> Iterator[Tile]:
        with _reading() as read:
            for spec in specs:
                for tile in tiles_of(whole(spec)):
                    yield tile, read(self._entries[spec.name], tile)


def _digest_of_tile(tile: Tile) -> tuple[Segment, int]:
    return tile[0], tensor_digest(*tile)


class _Reader:
    """Reads parts of tensors. It keeps the last file open, so that its tensors take one descriptor between them."""

    def __init__(self, opened: ExitStack) -> None:
        self._opened = opened
        self._path: Path | None = None
        self._file: BinaryIO

    def __call__(self, entry: StoredTensor, part: Segment) -> BitsArray:
        """Returns the part's bits. InputError for a file that has become shorter since its header was read.

        They are read and not mapped into memory: pages of a map count as memory for as long as the map lives, and a
        file that another process cuts off would end this process.
        """
        if self._path != entry.path:
            self._opened.close()
            self._file = self._opened.enter_context(entry.path.open("rb", buffering=0))
            self._path = entry.path
        bits_N = np.empty(part.length, bits_dtype(entry.spec.dtype))
        left, at = bits_N.view(np.uint8).data, entry.offset + part.start * bits_N.itemsize
        while left.nbytes:
            nbytes = os.preadv(self._file.fileno(), [left], at)
            if not nbytes:
                raise InputError(
                    f"{entry.path}: tensor {entry.spec.name} was cut off while it was read", path=str(entry.path)
                )
            left, at = left[nbytes:], at + nbytes
        return bits_N


@contextmanager
def _reading() -> Iterator[_Reader]:
    with ExitStack() as opened:
        yield _Reader(opened)


def _require_indexed(path: Path, found: frozenset[str], here: frozenset[str], anywhere: frozenset[str]) -> None:
    """InputError unless the file holds every tensor that the index assigns to it, and none that the index omits."""
    if lacking := here - found:
        problem = f"lacks tensor {min(lacking)}, which the index says it holds"
    elif unnamed := found - anywhere:
        problem = f"holds tensor {min(unnamed)}, which the index does not name"
    else:
        return
    raise InputError(f"{path} {problem}: the checkpoint is not whole, save it again", path=str(path))
