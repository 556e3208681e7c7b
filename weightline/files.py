"""Files on this host: one atomic write, one hash and the locks that processes exclude each other with.

All locks are flock(2) locks of the kernel, so a lock goes with its holder, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


def write_atomically(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Writes a file through a temporary name: a crash leaves the old file or the new one, never a part of one.

    Makes the folder if it is missing. `is_durable` also lets the file survive a power cut, which costs an fsync.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file in hex. Reads it in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive_lock(path: Path, *, waits: bool = False) -> Iterator[None]:
    """Holds the lock of a file for the length of the block.

    When another process has it: BlockingIOError at once, or with `waits` no end to waiting. The file is made if it is
    missing, and stays. OSError where the file system has no flock(2): a lock that is a mere file would outlive its
    holder.
    """
    lock = filelock.UnixFileLock(path, timeout=-1 if waits else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BlockingIOError(f"{path} is locked by another process") from error
    try:
        yield
    finally:
        lock.release()


class SharedLock:
    """A lock that several readers share, or one writer has. Two instances exclude each other within a process, too.

    It uses flock(2) itself, since the native locks of filelock are exclusive only, and since a writer must become a
    reader without a moment in between in which a third process could take the lock. One thread uses an instance.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, *, exclusive: bool) -> bool:
        """Tries to hold the lock, without waiting. A lock that is held already changes its kind, or stays as it was."""
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        if not self._is_current(self._descriptor):
            self.release()
            return False
        return True

    def remove(self) -> None:
        """Removes the lock file, which the caller holds exclusively. A process that waits for it notices that."""
        self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Gives the lock up. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the file that was locked is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
