"""The container of a payload: a safetensors file of two byte tensors, `chunks` and `table`, written in one pass.

The header has a fixed length and is written twice: blank at the start, and with its content when the sizes are known.
An incomplete file therefore starts with spaces, and readers refuse it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from weightline.errors import InputError, PayloadError
from weightline.files import sha256_of

#: With the eight bytes of its length, the header has 256 bytes, which suffices for payloads of up to 10**14 bytes.
_HEADER_NBYTES = 248
_MAX_HEADER_NBYTES = 1 << 16
#: A file of at most this many bytes after its header is hashed from memory.
ECHO_NBYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Envelope:
    """The layout of a payload file: offsets from the start of the file, and the header's metadata."""

    metadata: Mapping[str, str]
    chunks_start: int
    table_start: int
    nbytes: int


def reserve_header(file: BinaryIO) -> None:
    """Reserves space for the header at the start of an empty file."""
    file.write(b" " * (8 + _HEADER_NBYTES))


def write_header(file: BinaryIO, metadata: Mapping[str, str], chunks_nbytes: int, table_nbytes: int) -> bytes:
    """Writes the header into the reserved space and returns its bytes. InputError for more than about 10**14 bytes."""
    end = chunks_nbytes + table_nbytes
    entries = {
        "__metadata__": dict(metadata),
        "chunks": {"dtype": "U8", "shape": [chunks_nbytes], "data_offsets": [0, chunks_nbytes]},
        "table": {"dtype": "U8", "shape": [table_nbytes], "data_offsets": [chunks_nbytes, end]},
    }
    header = json.dumps(entries, separators=(",", ":")).encode().ljust(_HEADER_NBYTES)
    if len(header) > _HEADER_NBYTES:
        raise InputError(f"a payload of {end} bytes is too large for its header", nbytes=end)
    header = len(header).to_bytes(8, "little") + header
    file.seek(0)
    file.write(header)
    return header


def read_envelope(file: BinaryIO, nbytes: int) -> Envelope:
    """Parses and checks the header of a payload of `nbytes`. PayloadError names the broken rule."""
    header_nbytes = int.from_bytes(file.read(8), "little")
    if nbytes < 8 or header_nbytes > min(_MAX_HEADER_NBYTES, nbytes - 8):
        raise PayloadError(f"header of {header_nbytes} bytes in a file of {nbytes}", rule="header-length")
    try:
        entries = json.loads(file.read(header_nbytes).decode(), object_pairs_hook=_without_duplicates)
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__").items()}
        spans = {name: (entry["dtype"], *entry["shape"], *entry["data_offsets"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PayloadError(f"the header is not that of a payload: {error}", rule="header-json") from error
    data_nbytes = nbytes - 8 - header_nbytes
    chunks_nbytes = spans.get("chunks", ("", -1))[1]
    expected = {
        "chunks": ("U8", chunks_nbytes, 0, chunks_nbytes),
        "table": ("U8", data_nbytes - chunks_nbytes, chunks_nbytes, data_nbytes) if _is_size(chunks_nbytes) else None,
    }
    if spans != expected or chunks_nbytes > data_nbytes:
        raise PayloadError("the header's entries do not cover the file", rule="header-entries")
    start = 8 + header_nbytes
    return Envelope(metadata, start, start + chunks_nbytes, nbytes)


@dataclass(slots=True)
class Echo:
    """Keeps the bytes written after the header, up to a bound.

    The hash of the file begins with the header, which is written last, so small files are hashed from these bytes.
    """

    max_nbytes: int = ECHO_NBYTES
    nbytes: int = 0
    _parts: list[bytes] = field(default_factory=list)

    def add(self, *parts: bytes) -> None:
        """Adds the next bytes of the file."""
        self.nbytes += sum(map(len, parts))
        if self.nbytes <= self.max_nbytes:
            self._parts += parts
        else:
            self._parts.clear()

    def sha256_after(self, header: bytes, path: Path) -> str:
        """Returns the sha256 in hex of the header and all added bytes. Reads `path` when they exceed the bound."""
        if self.nbytes > self.max_nbytes:
            return sha256_of(path)
        digest = hashlib.sha256(header)
        for part in self._parts:
            digest.update(part)
        return digest.hexdigest()


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
