"""Objects that were fetched from remote buckets, kept on this host for the next reader.

    <folder>/objects/<sha256>    whole and checked when it got its name
    <folder>/partial/<sha256>    being downloaded; a later attempt continues it
    <folder>/locks/<sha256>      exclusive: who downloads or evicts; shared: who reads

Content-addressed: an object of any bucket is found by its sha256. Bounded: least recently used objects go first, by the
modification time, which every use renews; objects in use stay, even beyond the bound. Locks die with their process, so
a crash leaves nothing but a partial file. The first hit of a process on a file hashes it: what a disk or a hand has
changed since is fetched again. Later hits of the process look at the size alone.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightline.errors import InputError
from weightline.store import transfers
from weightline.store.locks import FileLock

#: Environment: the folder, and its bound in bytes (0: no cache).
FOLDER_VARIABLE = "WEIGHTLINE_CACHE"
NBYTES_VARIABLE = "WEIGHTLINE_CACHE_NBYTES"
_DEFAULT_FOLDER = "~/.cache/weightline"
_DEFAULT_NBYTES = 32 * 1024**3
#: Of the file system that holds it, when no bound is set.
_DEFAULT_SHARE = 5
_POLL_SECONDS = 0.05
#: Another process that holds an object and whose download does not grow for so long is not waited for.
_STALL_SECONDS = 120.0
_PARTIAL_SECONDS = 24 * 3600.0
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CachedObject:
    """An object that stays in the cache while this is held."""

    path: Path
    lock: FileLock

    def release(self) -> None:
        """Safe to repeat."""
        self.lock.release()


class ObjectCache:
    """A folder of objects by sha256. Safe for threads and processes of one host."""

    def __init__(self, folder: Path, max_nbytes: int) -> None:
        self.folder = folder
        self.max_nbytes = max_nbytes

    def fetch(self, sha256: str, nbytes: int, download: Callable[[Path], None]) -> CachedObject | None:
        """The object, from the cache or by `download(path)`; of several who want it, one downloads and others wait.

        `download` raises unless the file is the wanted object; it may continue a file that an earlier attempt left.
        None when the cache is no help: the object is larger than it may be, or somebody else's download stalls.
        """
        if nbytes > self.max_nbytes:
            return None
        lock = FileLock(self.folder / "locks" / sha256)
        path = self.folder / "objects" / sha256
        try:
            is_held = self._hold(lock, path, nbytes, download)
        except BaseException:
            lock.release()
            raise
        return CachedObject(path, lock) if is_held else None

    def _hold(self, lock: FileLock, path: Path, nbytes: int, download: Callable[[Path], None]) -> bool:
        """Share the lock of a sound object, downloading it if nobody does. False, holding nothing, after a stall."""
        partial = self.folder / "partial" / path.name
        stalled = _Stall(partial)
        while not stalled():
            if lock.take(exclusive=False) and _is_sound(path, nbytes):
                os.utime(path)
                return True
            if lock.take(exclusive=True):
                if not _is_sound(path, nbytes):
                    self._insert(path, partial, download)
                # Held while others make room, so that this object is not what they remove.
                if lock.take(exclusive=False) and _is_sound(path, nbytes):
                    self._make_room()
                    return True
            else:
                time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))
        lock.release()
        return False

    def _make_room(self) -> None:
        try:
            self.evict()
        except OSError as error:
            _logger.warning("the cache %s cannot be kept below %d bytes: %s", self.folder, self.max_nbytes, error)

    def evict(self) -> None:
        """Remove least recently used objects until the bound holds. Objects in use stay; safe at any time."""
        self._remove_old_partials()
        objects = sorted(_files(self.folder / "objects"), key=lambda entry: entry[1].st_mtime)
        excess = sum(found.st_size for _, found in objects) - self.max_nbytes
        for path, found in objects:
            if excess <= 0:
                return
            lock = FileLock(self.folder / "locks" / path.name)
            if lock.take(exclusive=True):
                path.unlink(missing_ok=True)
                lock.remove()
                excess -= found.st_size

    def _insert(self, path: Path, partial: Path, download: Callable[[Path], None]) -> None:
        partial.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        download(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _sound.add(_file_of(path, path.stat()))

    def _remove_old_partials(self) -> None:
        for path, found in _files(self.folder / "partial"):
            # A store may have left a hidden file of its own beside the one it was asked for.
            lock = FileLock(self.folder / "locks" / path.name.lstrip(".").partition(".")[0])
            if time.time() - found.st_mtime > _PARTIAL_SECONDS and lock.take(exclusive=True):
                transfers.discard(path)
                lock.remove()


class _Stall:
    """Whether a file has not grown for too long."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nbytes = -1
        self._since = time.monotonic()

    def __call__(self) -> bool:
        nbytes = self._path.stat().st_size if self._path.exists() else 0
        if nbytes != self._nbytes:
            self._nbytes, self._since = nbytes, time.monotonic()
        return time.monotonic() - self._since > _STALL_SECONDS


#: Files that this process hashed and found to be what their names say. A file that replaces one is another.
_sound: set[tuple[str, int, int]] = set()


def _is_sound(path: Path, nbytes: int) -> bool:
    """Whether the file has that size, and, when this process looks for the first time, the sha256 that is its name."""
    try:
        found = path.stat()
        if found.st_size != nbytes:
            return False
        if _file_of(path, found) not in _sound:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != path.name:
                    _logger.warning("the cache's %s has other bytes than were put there; fetching it again", path)
                    return False
            _sound.add(_file_of(path, found))
    except FileNotFoundError:
        return False
    return True


def _file_of(path: Path, found: os.stat_result) -> tuple[str, int, int]:
    return str(path), found.st_dev, found.st_ino


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:
            continue
    return found


def host_cache() -> ObjectCache | None:
    """The cache of this host as the environment sets it; None when its bound is 0. InputError for a bad bound."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or _DEFAULT_FOLDER).expanduser()
    text = os.environ.get(NBYTES_VARIABLE)
    if text is not None:
        if not text.isdecimal():
            raise InputError(f"{NBYTES_VARIABLE}={text!r} is no number of bytes", variable=NBYTES_VARIABLE)
        max_nbytes = int(text)
    else:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        max_nbytes = min(_DEFAULT_NBYTES, shutil.disk_usage(existing).total // _DEFAULT_SHARE)
    return ObjectCache(folder, max_nbytes) if max_nbytes else None
