"""Writes a version as a normal Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import safetensors

from weightline.chain.files.assets import assets_of, write_assets
from weightline.chain.files.source import VersionSource, WeightSource
from weightline.chain.files.weight_files import ADAPTER_CONFIG
from weightline.chain.read.history import Chain
from weightline.chain.replay.fetch import fetching
from weightline.dtypes import DTYPES
from weightline.errors import InputError
from weightline.format import keys
from weightline.format.manifest import Header
from weightline.types import BitsArray, TensorSpec

#: The fields of `VersionMark`, as a JSON object.
MARKER = keys.VERSION_MARK

_PARTIAL = ".weightline-partial"

_INDEX = "model.safetensors.index.json"

#: The bound by which transformers splits a checkpoint into shards.
MAX_SHARD_NBYTES = 5 * 1000**3


@dataclass(frozen=True, slots=True)
class VersionMark:
    """Names the version that a folder of weights holds: a pulled checkpoint, or a trainer's checkpoint."""

    chain: str
    """URL of the chain, as the writer of the folder spelled it."""
    version: int
    commit_id: str
    run_id: str = ""
    stage: str = ""
    global_step: int = 0

    @classmethod
    def of(cls, chain: Chain, header: Header) -> Self:
        """Returns the mark of a version of the chain."""
        return cls(chain.url, header.version, header.commit_id, header.run_id, header.stage, header.global_step)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Returns the mark of a folder; None where there is none, or none that can be read."""
        try:
            found = json.loads((folder / MARKER).read_bytes())
            known = {name: found[name] for name in cls.__slots__ if name in found}
            return cls(**known)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        """Writes the mark into the folder. Safe to repeat."""
        (folder / MARKER).write_text(json.dumps(asdict(self)))

    def is_same_version(self, other: VersionMark | None) -> bool:
        """Returns whether both marks name the same version of the same chain.

        Other fields are ignored, since marks of earlier releases lack them.
        """
        own = (self.chain, self.version, self.commit_id)
        return other is not None and own == (other.chain, other.version, other.commit_id)


def write_checkpoint(chain: Chain, version: int, out_dir: Path, max_shard_nbytes: int = MAX_SHARD_NBYTES) -> None:
    """Writes a version into a new folder: weights as safetensors, and the small files that transformers needs.

    Memory holds the tensors of one file at a time. All files are written to a hidden folder inside `out_dir` and moved
    up at the end, the marker `weightline.json` last: a folder without it is incomplete. InputError when `out_dir` holds
    another version or foreign files, or cannot be written. Safe to repeat otherwise: remains of a crash are removed.
    """
    mark = VersionMark.of(chain, chain.header(version))
    assets = assets_of(chain, version)
    files = plan_files(
        chain.layout(version).by_name,
        is_adapter=any(asset.name == ADAPTER_CONFIG for asset in assets),
        max_shard_nbytes=max_shard_nbytes,
    )
    partial = out_dir / _PARTIAL
    with _errors_of(out_dir):
        if mark.is_same_version(VersionMark.read(out_dir)):
            return
        _require_new(out_dir, {MARKER, _INDEX, *files, *(_top(asset.name) for asset in assets)})
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            mark.write(partial)
            with fetching(chain.store) as fetcher:
                write_assets(assets, partial, fetcher)
                _write_files(VersionSource(chain, version, fetcher), files, partial)
            _move_up(partial, out_dir)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _errors_of(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{out_dir} cannot be written: {error}. Name a folder with room for the model", path=str(out_dir)
        ) from error


def _require_new(out_dir: Path, ours: set[str]) -> None:
    """Raises InputError unless the folder is absent, empty, or left by a crash.

    A crash leaves the hidden folder, and beside it no files but `ours`.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise InputError(f"{out_dir} is a file: name a new folder", path=str(out_dir))
    found = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if found - {_PARTIAL} - (ours if _PARTIAL in found else set()):
        raise InputError(f"{out_dir} is not empty: name a new folder", path=str(out_dir))


def _move_up(partial: Path, out_dir: Path) -> None:
    for path in sorted(partial.iterdir(), key=lambda path: path.name == MARKER):
        target = out_dir / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)  # what a crash left of this version: no rename replaces a folder that holds files
        path.replace(target)


def _top(path: str) -> str:
    return PurePosixPath(path).parts[0]


def plan_files(
    specs: Mapping[str, TensorSpec], *, is_adapter: bool = False, max_shard_nbytes: int = MAX_SHARD_NBYTES
) -> dict[str, list[str]]:
    """Returns the tensors of each file: model.safetensors, or shards when the state exceeds one shard.

    An adapter is one file, adapter_model.safetensors, since peft reads one file of any size.
    """
    if is_adapter:
        return {"adapter_model.safetensors": list(specs)}
    shards = list(_shards(specs, max_shard_nbytes))
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, 1)}


def _shards(specs: Mapping[str, TensorSpec], max_nbytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    nbytes = 0
    for name, spec in specs.items():
        if names and nbytes + spec.nbytes > max_nbytes:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += spec.nbytes
    yield names


def _write_files(target: WeightSource, files: Mapping[str, list[str]], folder: Path) -> None:
    specs = target.specs
    for file_name, names in files.items():
        _write_file(specs, target.read(names), folder / file_name)
        shutil.copymode(folder / MARKER, folder / file_name)  # safetensors creates files that only their owner can read
    if len(files) > 1:
        total_size = sum(spec.nbytes for spec in specs.values())
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))


def _write_file(specs: Mapping[str, TensorSpec], bits: Mapping[str, BitsArray], path: Path) -> None:
    tensors = {}
    for name, bits_N in bits.items():
        spec = specs[name]
        tensors[name] = safetensors.TensorSpec(
            dtype=DTYPES[spec.dtype].torch_name, shape=spec.shape, data_ptr=bits_N.ctypes.data, data_len=bits_N.nbytes
        )
    safetensors.serialize_file(tensors, os.fspath(path), {"format": "pt"})
