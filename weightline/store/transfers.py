"""Bytes under way between this process and any bucket: counted for progress bars, and continued after a cut.

A watcher counts for the whole process, since one transfer runs on several threads. A note beside a partial file says of
which object it is a part, and how many of its first bytes are there; it goes when the file is whole. The note decides
nothing about trust: the reader checks the sha256 of the whole.
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
    """Call `watcher(nbytes)` for every piece that moves, from any thread, until the block ends."""
    with _lock:
        _watchers.append(watcher)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(watcher)


def moved(nbytes: int) -> None:
    """Say that a store moved a piece of an object."""
    if not _watchers:
        return
    with _lock:
        watchers = tuple(_watchers)
    for watcher in watchers:
        watcher(nbytes)


def copy_counted(source: BinaryIO, target: BinaryIO) -> None:
    """Copy to the end of `source`, a piece at a time, telling whoever watches."""
    buffer = memoryview(bytearray(_COPY_NBYTES))
    while nbytes := source.readinto(buffer):  # type: ignore[attr-defined]
        target.write(buffer[:nbytes])
        moved(nbytes)


def note_of(path: Path) -> Path:
    """Where the note of the partial file at `path` stands."""
    return path.with_name(f"{path.name}.resume")


def num_bytes_done(path: Path, identity: str) -> int:
    """How many first bytes of the object `identity` stand at `path`; starts the file over when it is another's.

    `identity` is one line that names the object's content: key, entity tag and size.
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
    """The first `nbytes` of the object are there."""
    note_of(path).write_text(f"{identity}\n{nbytes}")


def finish(path: Path) -> None:
    """The file is whole. Safe to repeat."""
    note_of(path).unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a partial file and its note. Safe to repeat."""
    path.unlink(missing_ok=True)
    note_of(path).unlink(missing_ok=True)
