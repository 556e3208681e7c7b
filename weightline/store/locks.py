"""Locks between processes of one host: flock(2) on a file of their own, gone with the process that held them."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FileLock:
    """One holder's claim on a lock file. Not for sharing between threads; two of them exclude each other anywhere."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self, *, exclusive: bool) -> bool:
        """Try to hold the lock, without waiting. A lock that is held already changes its kind, or stays as it was."""
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
        """Remove the lock file; only while holding it exclusively. Who waits on it notices and starts over."""
        self._path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Safe to repeat."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _is_current(self, descriptor: int) -> bool:
        """Whether the file that was locked is still the one at the path."""
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.stat())
        except FileNotFoundError:
            return False
