"""Proves that a checkpoint folder holds exactly the bits of a version, and computes the digest of its state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from weightline.codec.digest import format_digest, tensor_digest
from weightline.codec.torch_ops import bits_of
from weightline.errors import DigestMismatchError
from weightline.format.manifest import Manifest
from weightline.types import BitsArray, Segment


def prove_checkpoint(folder: Path, manifest: Manifest) -> str:
    """Compares the digests of the folder's tensors with the manifest's. Returns the digest of the whole state.

    DigestMismatchError names the first tensor that differs, is missing, or is not in the version. Reads only.
    """
    specs = manifest.specs
    found = {}
    for name, bits_N in _tensors(folder):
        whole = Segment(specs[name], 0, specs[name].num_elements) if name in specs else None
        is_whole = whole is not None and whole.length == bits_N.size
        found[name] = format_digest(tensor_digest(whole, bits_N)) if whole and is_whole else "another shape"
    for name in sorted(found.keys() | specs.keys()):
        actual, expected = found.get(name, "missing"), manifest.digests.get(name, "no such tensor")
        if actual != expected:
            raise DigestMismatchError(
                f"{folder}: tensor {name} is {actual}, version {manifest.version} has {expected}",
                what=name, version=manifest.version, expected=expected, actual=actual,
            )  # fmt: skip
    return state_digest(found)


def state_digest(digests: dict[str, str]) -> str:
    """Returns one sha256 over the tensors' names and digests. It is equal for equal states of all chains."""
    canonical = json.dumps(sorted(digests.items()), separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _tensors(folder: Path) -> Iterator[tuple[str, BitsArray]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, bits_of(file.get_tensor(name))
