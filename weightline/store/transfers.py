"""Counts transferred bytes for progress bars, and lets interrupted downloads continue.

A watcher counts the bytes of the whole process, since one transfer runs on several threads. A note beside a partial
file records the object and the number of its first bytes that the file holds; it is removed when the file is complete.
Correctness does not depend on the note, since the reader checks the sha256 of the complete file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: Small enough to stay in a core's cache.
_COPY_NBYTES = 1024 * 1024

Watcher = Callable[[int], None]

_watchers: list[Watcher] = []

_lock = threading.Lock()


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Calls `watcher(nbytes)` for every transferred piece, from any thread, until the block ends."""
    with _lock:
        _watchers.append(watcher)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(watcher)


def moved(nbytes: int) -> None:
    """Reports to all watchers that a store transferred a piece of an object."""
    if not _watchers:
        return
    with _lock:
        watchers = tuple(_watchers)
    for watcher in watchers:
        watcher(nbytes)


def copy_counted(source: BinaryIO, target: BinaryIO) -> None:
    """Copies `source` to its end, a piece at a time, and reports every piece to the watchers."""
    buffer = memoryview(bytearray(_COPY_NBYTES))
    while nbytes := source.readinto(buffer):  # type: ignore[attr-defined]
        target.write(buffer[:nbytes])
        moved(nbytes)


def note_of(path: Path) -> Path:
    """Returns the path of the note that belongs to the partial file at `path`."""
    return path.with_name(f"{path.name}.resume")


def num_bytes_done(path: Path, identity: str) -> int:
    """Returns how many first bytes of the object `identity` the file at `path` holds.

    Empties the file when it belongs to another object, or has no note. `identity` is one line that names the object's
    content: key, entity tag and size.
    """
    try:
        noted, _, done = note_of(path).read_text().partition("\n")
        if noted == identity and path.stat().st_size >= int(done):
            return int(done)
    except (FileNotFoundError, ValueError):
        pass
    path.write_bytes(b"")
    return 0


def note_done(path: Path, identity: str, nbytes: int) -> None:
    """Records that the file holds the first `nbytes` of the object."""
    note_of(path).write_text(f"{identity}\n{nbytes}")


def finish(path: Path) -> None:
    """Removes the note of a complete file. Safe to repeat."""
    note_of(path).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Removes a partial file and its note. Safe to repeat."""
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)
