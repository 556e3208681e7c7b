"""Files on this host: an atomic write, a hash, copies, and locks between processes.

All locks are flock(2) locks, so the kernel releases a lock when its holder ends in any way.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock


def user_path(text: str | Path) -> Path:
    """Returns the path that a person typed, with `~` as the home folder. `~name` of no user stays as it is."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises RuntimeError for such a name


def write_atomically(path: Path, text: str, *, is_durable: bool = True) -> None:
    """Writes a file through a temporary name: a crash leaves the old file or the new one, never a part of one.

    Creates a missing folder. With `is_durable` the file also survives a power cut, which costs an fsync.
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


def copy_file(source: Path, target: Path) -> None:
    """Copies a file, and creates the folders above its target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a second name for a file, or a copy of it where the file system has no hard links or it lies on another."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def exclusive_lock(path: Path, *, waits: bool = False) -> Iterator[None]:
    """Holds the lock of a file during the block.

    If another process has it, this raises BlockingIOError at once, or with `waits` waits without a limit. A missing
    file is created; it stays. OSError when the file system lacks flock(2), since a lock by the file's existence alone
    would outlive its holder.
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
    """A lock that several readers share, or that one writer holds. It also works between instances in one process.

    It uses flock(2) itself, since the native locks of filelock are exclusive only, and since a writer must be able to
    become a reader atomically. An instance is for one thread.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, *, exclusive: bool) -> bool:
        """Tries to take the lock without waiting, or to change the kind of a held one. Returns whether it is held.

        After a failure the lock is not held, even if it was held before.
        """
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
        """Removes the lock file and releases the lock, which the caller holds exclusively.

        A process that then locks the removed file notices that and does not get the lock.
        """
        self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Releases the lock. Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Returns whether the locked file is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
