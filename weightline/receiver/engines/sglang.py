"""A chain as SGLang's `/pull_weights` reads it: a folder `weight_v{N:06d}` a version, on a file system that it shares.

Layout as in sgl-project/sglang `srt/weight_sync/local_checkpoint.py` (and slime's disk deltas): version 0 is the
engine's own model path; a full version is a plain checkpoint folder; a delta is a folder of safetensors files that
hold, by tensor name, the zstd-compressed XOR of all bytes of the tensor before and after, with adler32 checksums of the
new bytes as file metadata, and an index that names the version and its base. `/update_weights_from_disk` reads full
versions directly.

SGLang keeps no proof of its base and has no way back but a full version: what the chain guarantees ends where the
folder begins. Every version is read from the chain with its digests checked.

Legend: N elements of a tensor.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors
import zstandard

from weightline.chain import Chain
from weightline.chain.checkpoint import write_checkpoint
from weightline.chain.fetch import Fetcher, fetching
from weightline.chain.groups import tensor_groups
from weightline.chain.state import HostState, read_state
from weightline.errors import InputError

INDEX = "model.safetensors.index.json"
_LEVEL = 1


def version_folder(source_dir: Path, version: int) -> Path:
    """Where a version is published."""
    return source_dir / f"weight_v{version:06d}"


def publish_version(chain: Chain, version: int, source_dir: Path, *, is_full: bool = False) -> Path:
    """Publish one version: as a delta against the version before it, or full; return its folder.

    Version 0 is always full: start SGLang on it (`--model-path`). The folder appears whole, in one rename; a crash
    leaves a folder that begins with a dot. Safe to repeat: what is there stays. VersionNotFoundError for an unknown
    version.
    """
    folder = version_folder(source_dir, version)
    if folder.exists():
        return folder
    chain.manifest(version)
    source_dir.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=source_dir))
    is_published = False
    try:
        if is_full or version == 0:
            write_checkpoint(chain, version, draft)
        else:
            _write_delta(chain, version, draft)
        draft.chmod(0o755)
        draft.rename(folder)
        is_published = True
    finally:
        if not is_published:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def publish_up_to(chain: Chain, version: int, source_dir: Path) -> list[Path]:
    """Publish every version from the newest published one, or from 0, up to `version`; the folders that are new.

    InputError where the chain no longer has all of them: SGLang could not follow. Safe to repeat.
    """
    chain.manifest(version)
    published = [number for number in range(version + 1) if version_folder(source_dir, number).exists()]
    first = published[-1] + 1 if published else 0
    missing = chain.versions(first, version)
    if missing != tuple(range(first, version + 1)):
        raise InputError(
            f"versions {first} to {version} of {chain.url} are not all there: publish {missing[0]} in full first",
            version=missing[0],
        )
    return [publish_version(chain, number, source_dir) for number in missing]


def _write_delta(chain: Chain, version: int, folder: Path) -> None:
    weight_map: dict[str, str] = {}
    with fetching(chain.store) as fetcher:
        groups = tensor_groups(chain.manifest(version).specs.values())
        for number, names in enumerate(groups):
            differences, checksums = _differences(chain, version, names, fetcher)
            if not differences:
                continue
            file_name = f"model-{number:05d}.safetensors"
            _write_file(folder / file_name, differences, checksums)
            weight_map |= dict.fromkeys(differences, file_name)
    metadata = {
        "version": f"{version:06d}",
        "base_version": f"{version - 1:06d}",
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": "adler32",
    }
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))


def _differences(
    chain: Chain, version: int, names: frozenset[str], fetcher: Fetcher
) -> tuple[dict[str, bytes], dict[str, str]]:
    """(compressed XOR, checksum of the new bytes) of the tensors of a group that differ."""
    old = read_state(chain, version - 1, names.__contains__, fetcher)
    new = read_state(chain, version, names.__contains__, fetcher)
    differences: dict[str, bytes] = {}
    checksums: dict[str, str] = {}
    for name, difference_N in _xor(old, new):
        differences[name] = zstandard.ZstdCompressor(_LEVEL).compress(difference_N.tobytes())
        checksums[name] = f"{zlib.adler32(new.bits[name].tobytes()):08x}"
    return differences, checksums


def _xor(old: HostState, new: HostState) -> Iterator[tuple[str, np.ndarray[tuple[int], np.dtype[np.uint8]]]]:
    for name, bits_N in new.bits.items():
        if old.digests[name] != new.digests[name]:
            yield name, np.bitwise_xor(old.bits[name].view(np.uint8), bits_N.view(np.uint8))


def _write_file(path: Path, differences: dict[str, bytes], checksums: dict[str, str]) -> None:
    held = {name: np.frombuffer(raw, np.uint8) for name, raw in differences.items()}
    tensors = {
        name: safetensors.TensorSpec(dtype="uint8", shape=(raw.size,), data_ptr=raw.ctypes.data, data_len=raw.nbytes)
        for name, raw in held.items()
    }
    safetensors.serialize_file(tensors, str(path), checksums)
