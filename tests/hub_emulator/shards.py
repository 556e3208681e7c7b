"""The two binary forms that hf_xet uploads: shards (which chunks make a file) and xorbs (the chunks)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

_RECORD_NBYTES = 48
_MAGIC = b"HFRepoMetaData"
_END = b"\xff" * 32
_HAS_VERIFICATION = 1 << 31
_HAS_METADATA = 1 << 30


@dataclass(frozen=True, slots=True)
class Term:
    """Chunks first_chunk..end_chunk of a xorb, `nbytes` of the file."""

    xorb: str
    nbytes: int
    first_chunk: int
    end_chunk: int


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """Where a chunk stands in the stored xorb, and how many bytes of the file it holds."""

    start: int
    end: int
    nbytes: int


def hash_text(raw: bytes) -> str:
    """Xet's text of a 32-byte hash: four little-endian u64 in hex, which is not raw.hex()."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def parse_shard(raw: bytes) -> dict[str, list[Term]]:
    """The files that an uploaded shard describes. Uploaded shards have no footer, so they are read forward."""
    if raw[: len(_MAGIC)] != _MAGIC:
        raise ValueError("not a shard")
    files: dict[str, list[Term]] = {}
    offset = _RECORD_NBYTES
    while True:
        file_hash, flags, num_terms, _ = struct.unpack_from("<32sIIQ", raw, offset)
        offset += _RECORD_NBYTES
        if file_hash == _END:
            return files
        terms = []
        for number in range(num_terms):
            fields = struct.unpack_from("<32sIIII", raw, offset + number * _RECORD_NBYTES)
            terms.append(Term(hash_text(fields[0]), fields[2], fields[3], fields[4]))
        files[hash_text(file_hash)] = terms
        num_records = num_terms * (2 if flags & _HAS_VERIFICATION else 1) + bool(flags & _HAS_METADATA)
        offset += num_records * _RECORD_NBYTES


def chunk_spans(path: Path) -> list[ChunkSpan]:
    """The chunks of a stored xorb. Each has an 8-byte header with two 3-byte lengths; older clients add a footer."""
    raw = path.read_bytes()
    spans, start = [], 0
    while start + 8 <= len(raw) and raw[start] == 0 and raw[start : start + 7] != b"XETBLOB":
        end = start + 8 + int.from_bytes(raw[start + 1 : start + 4], "little")
        spans.append(ChunkSpan(start, end, int.from_bytes(raw[start + 5 : start + 8], "little")))
        start = end
    return spans
