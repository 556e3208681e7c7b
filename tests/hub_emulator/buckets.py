"""Buckets: which path stands for which content since when. Every change is kept, so that a listing can lag."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a bucket. Times are milliseconds since the epoch; `uploaded_ms` is the server's."""

    xet_hash: str
    size: int
    mtime_ms: float
    uploaded_ms: float


@dataclass(slots=True)
class Bucket:
    """Paths and their entries over time. `lock` makes compare-and-write atomic."""

    is_private: bool
    created_ms: float
    lock: threading.RLock = field(default_factory=threading.RLock)
    _changes: dict[str, list[tuple[float, FileEntry | None]]] = field(default_factory=dict)

    def write(self, path: str, entry: FileEntry) -> None:
        with self.lock:
            self._changes.setdefault(path, []).append((entry.uploaded_ms, entry))

    def remove(self, path: str, now_ms: float) -> bool:
        """Whether there was anything to remove."""
        with self.lock:
            existed = self.find(path) is not None
            if existed:
                self._changes[path].append((now_ms, None))
            return existed

    def find(self, path: str, at_ms: float = float("inf")) -> FileEntry | None:
        """The entry as seen by somebody who sees changes up to a moment."""
        with self.lock:
            seen = [entry for when, entry in self._changes.get(path, []) if when <= at_ms]
        return seen[-1] if seen else None

    def files(self, prefix: str = "", at_ms: float = float("inf")) -> dict[str, FileEntry]:
        with self.lock:
            paths = sorted(path for path in self._changes if path.startswith(prefix))
            found = {path: self.find(path, at_ms) for path in paths}
        return {path: entry for path, entry in found.items() if entry is not None}


def is_valid_path(path: str) -> bool:
    """The service's rules for paths."""
    is_edge_bad = path.startswith(("/", "./")) or path.endswith(("/", "..")) or not path
    return not is_edge_bad and not any(part in path for part in ("//", "../", "\\", "\0"))
