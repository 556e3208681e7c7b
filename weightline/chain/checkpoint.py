"""A version as a normal Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import safetensors

from weightline.chain.assets import ADAPTER_CONFIG
from weightline.chain.fetch import fetching
from weightline.chain.history import Chain
from weightline.chain.state import HostState, read_state
from weightline.errors import InputError
from weightline.format.manifest import AssetRef

#: What says in a folder which version it holds.
MARKER = "weightline.json"
_MAX_SHARD_NBYTES = 5 * 1000**3


def write_checkpoint(chain: Chain, version: int, out_dir: Path) -> None:
    """Materialize a version into a new folder: weights as safetensors, and what transformers needs beside them.

    The marker `weightline.json` is written last: a folder without it is incomplete. InputError when `out_dir` holds
    another version or foreign files; safe to repeat otherwise.
    """
    marker = out_dir / MARKER
    manifest = chain.manifest(version)
    wanted = {"chain": chain.url, "version": version, "commit_id": manifest.commit_id}
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return
    if out_dir.exists() and any(out_dir.iterdir()):
        raise InputError(f"{out_dir} is not empty: name a new folder", path=str(out_dir))
    out_dir.mkdir(parents=True, exist_ok=True)
    assets = assets_of(chain, version)
    with fetching(chain.store) as fetcher:
        fetcher.prefetch(assets)
        for asset in assets:
            shutil.copyfile(fetcher.fetch(asset), out_dir / asset.name)
        state = read_state(chain, version, fetcher=fetcher)
    if any(asset.name == ADAPTER_CONFIG for asset in assets):
        write_adapter_weights(state, out_dir)
    else:
        write_weights(state, out_dir)
    marker.write_text(json.dumps(wanted))


def assets_of(chain: Chain, version: int) -> tuple[AssetRef, ...]:
    """The model's small files as of a version: those of the newest manifest up to it that names any."""
    for candidate in reversed(chain.versions(last=version)):
        if assets := chain.manifest(candidate).assets:
            return assets
    return ()


def write_weights(state: HostState, out_dir: Path) -> None:
    """model.safetensors, or shards with an index when the state is larger than one shard."""
    shards = list(_shards(state))
    if len(shards) == 1:
        _write_shard(state, shards[0], out_dir / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(state, names, out_dir / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total_size = sum(spec.nbytes for spec in state.specs.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_adapter_weights(state: HostState, out_dir: Path) -> None:
    """adapter_model.safetensors: peft reads one file, whatever its size."""
    _write_shard(state, list(state.specs), out_dir / "adapter_model.safetensors")


def _shards(state: HostState) -> Iterator[list[str]]:
    names: list[str] = []
    nbytes = 0
    for name, spec in state.specs.items():
        if names and nbytes + spec.nbytes > _MAX_SHARD_NBYTES:
            yield names
            names, nbytes = [], 0
        names.append(name)
        nbytes += spec.nbytes
    yield names


def _write_shard(state: HostState, names: list[str], path: Path) -> None:
    tensors = {}
    for name in names:
        spec, bits_N = state.specs[name], state.bits[name]
        tensors[name] = safetensors.TensorSpec(
            dtype=_RUST_DTYPE[spec.dtype], shape=spec.shape, data_ptr=bits_N.ctypes.data, data_len=bits_N.nbytes
        )
    safetensors.serialize_file(tensors, os.fspath(path), {"format": "pt"})


#: safetensors' own writer takes these names for the dtype codes of the format.
_RUST_DTYPE = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
