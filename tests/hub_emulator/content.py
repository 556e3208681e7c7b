"""The content store: xorbs on disk, and which chunks of them make each file. Hashes are the client's word."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hub_emulator.shards import ChunkSpan, Term, chunk_spans, parse_shard

EMPTY_FILE = "0" * 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a file: consecutive chunks of a xorb that touch the range asked for."""

    xorb: str
    first_chunk: int
    end_chunk: int
    nbytes: int
    url_start: int
    url_end: int


class ContentStore:
    """Thread-safe. A file is known once a shard that describes it arrived."""

    def __init__(self, root: Path) -> None:
        self._xorbs = root / "xorbs"
        self._xorbs.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, list[Term]] = {}
        self._spans: dict[str, list[ChunkSpan]] = {}
        self._lock = threading.Lock()

    def xorb_path(self, xorb: str) -> Path:
        return self._xorbs / xorb

    def put_xorb(self, xorb: str, raw: bytes) -> bool:
        """Whether it was new."""
        path = self.xorb_path(xorb)
        if path.exists():
            return False
        staged = path.with_name(uuid.uuid4().hex)
        staged.write_bytes(raw)
        staged.replace(path)
        return True

    def put_shard(self, raw: bytes) -> None:
        """Raises ValueError when it names chunks that are not there."""
        files = parse_shard(raw)
        for terms in files.values():
            for term in terms:
                if not self.xorb_path(term.xorb).exists() or term.end_chunk > len(self.spans(term.xorb)):
                    raise ValueError(f"shard names chunks of {term.xorb} that are not there")
        with self._lock:
            self._files.update(files)

    def spans(self, xorb: str) -> list[ChunkSpan]:
        if xorb not in self._spans:
            self._spans[xorb] = chunk_spans(self.xorb_path(xorb))
        return self._spans[xorb]

    def nbytes_of(self, file_hash: str) -> int | None:
        if file_hash == EMPTY_FILE:
            return 0
        terms = self._files.get(file_hash)
        return None if terms is None else sum(term.nbytes for term in terms)

    def xorbs_of(self, file_hash: str) -> list[Path]:
        """For tests that damage stored content."""
        return [self.xorb_path(term.xorb) for term in self._files[file_hash]]

    def reconstruct(self, file_hash: str, first: int, last: int) -> tuple[int, list[Piece]]:
        """The pieces that hold bytes first..last, and how many bytes to skip in the first of them."""
        pieces, position, skip = [], 0, None
        for term in self._files[file_hash]:
            touched = []
            for chunk, span in enumerate(self.spans(term.xorb)[term.first_chunk : term.end_chunk], term.first_chunk):
                start, position = position, position + span.nbytes
                if position > first and start <= last:
                    touched.append((chunk, span))
                    skip = first - start if skip is None else skip
            if touched:
                pieces.append(_piece(term.xorb, touched))
        return skip or 0, pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)


def _piece(xorb: str, touched: list[tuple[int, ChunkSpan]]) -> Piece:
    return Piece(
        xorb,
        first_chunk=touched[0][0],
        end_chunk=touched[-1][0] + 1,
        nbytes=sum(span.nbytes for _, span in touched),
        url_start=touched[0][1].start,
        url_end=touched[-1][1].end - 1,
    )
