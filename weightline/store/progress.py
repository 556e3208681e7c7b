"""Bytes that move between this process and any bucket, told to whoever watches: for progress bars.

A watcher counts for the whole process, since one transfer runs on several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
