"""Proof that a version of the chain is, bit for bit, what a trainer saved: the bytes of both, not their digests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import deserialize

from weightline.chain import Chain
from weightline.chain.replay.state import HostState, read_state


def differing_tensors(chain: Chain, version: int, model_dir: Path) -> list[str]:
    """Names of tensors whose dtype, shape or any bit differs, or that only one side has. Empty: equal. Reads only.

    Replays the version from the bucket. Raises what a replay raises: DigestMismatchError, VersionNotFoundError, ...
    """
    state = read_state(chain, version)
    saved: set[str] = set()
    different: list[str] = []
    for name, facts in _saved_tensors(model_dir):
        saved.add(name)
        if not _is_equal(state, name, facts["dtype"], tuple(facts["shape"]), facts["data"]):
            different.append(name)
    return sorted({*different, *(state.specs.keys() - saved)})


def _is_equal(state: HostState, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> bool:
    spec = state.specs.get(name)
    return spec is not None and (spec.dtype, spec.shape) == (dtype, shape) and state.bits[name].tobytes() == bytes(data)


def _saved_tensors(model_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every tensor of the folder's safetensors files, one file in memory at a time."""
    for path in sorted(model_dir.glob("*.safetensors")):
        yield from deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
