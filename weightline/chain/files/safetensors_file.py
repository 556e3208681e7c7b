"""Writes a safetensors file from tiles, so that memory does not grow with the file.

The bytes are those that the safetensors package writes for the same tensors: that package takes whole tensors only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from weightline.dtypes import DTYPES
from weightline.types import BitsArray, Segment, TensorSpec

#: The dtypes in the order of the package's own list. A file holds tensors of later ones first, then by name.
_ORDER = (
    "BOOL", "F4", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "F64",
    "I64", "U64",
)  # fmt: skip
#: The header ends at a multiple of so many bytes, so that the tensors are aligned.
_ALIGNMENT = 8


def write_safetensors(
    path: Path,
    specs: Iterable[TensorSpec],
    tiles: Callable[[Sequence[TensorSpec]], Iterator[tuple[Segment, BitsArray]]],
) -> None:
    """Writes the tensors to a new file, in the order of the format. A crash leaves a part of a file.

    `tiles` yields the tiles of the tensors that it is given, one tensor after the other.
    """
    ordered = sorted(specs, key=lambda spec: (-_ORDER.index(spec.dtype), spec.name))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for _, bits_N in tiles(ordered):
            file.write(bits_N.data)


def _header(ordered: Sequence[TensorSpec]) -> bytes:
    """Returns the length of the header and the header."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": _shape_in_values(spec), "data_offsets": [start, end]}
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _shape_in_values(spec: TensorSpec) -> list[int]:
    """Returns the shape that a header states: it counts the values of a packed dtype, torch its bytes."""
    num_packed = DTYPES[spec.dtype].num_packed
    return list(spec.shape) if num_packed == 1 else [*spec.shape[:-1], spec.shape[-1] * num_packed]
