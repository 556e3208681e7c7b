"""The cache of this host: objects that were fetched from remote buckets.

    <folder>/objects/<sha256>    a complete object, checked before it was moved here
    <folder>/partial/<sha256>    a download in progress; a later attempt continues it
    <folder>/locks/<sha256>      held exclusively to download or evict the object, shared to read it

The cache is content-addressed: an object of any bucket is found by its sha256. Its size is bounded: the least recently
used objects are evicted first, by access time, which every use renews. Objects in use stay, even beyond the bound.
Locks end with their process, so a crash leaves at most a partial file. The first hit of a process on a file hashes it,
and so does a hit on a file whose size or modification time has changed since. A file with other bytes is fetched again.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from weightline.errors import InputError
from weightline.files import SharedLock, sha256_of, user_path
from weightline.store import transfers

#: Environment variable: the folder of the cache.
FOLDER_VARIABLE = "WEIGHTLINE_CACHE"
#: Environment variable: the bound of the cache in bytes. 0 disables the cache.
NBYTES_VARIABLE = "WEIGHTLINE_CACHE_NBYTES"
_DEFAULT_FOLDER = "~/.cache/weightline"
_DEFAULT_NBYTES = 32 * 1024**3
#: Without a set bound, the cache takes at most one fifth of its file system.
_DEFAULT_SHARE = 5
_POLL_SECONDS = 0.05
#: A download of another process that has not grown for this long counts as stalled; the caller stops waiting for it.
_STALL_SECONDS = 120.0
_PARTIAL_SECONDS = 24 * 3600.0
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class CachedObject:
    """An object that cannot be evicted until `release` is called."""

    path: Path
    lock: SharedLock

    def release(self) -> None:
        """Allows eviction again. Safe to repeat."""
        self.lock.release()


class ObjectCache:
    """A folder of objects by sha256. Safe for threads and processes of one host."""

    def __init__(self, folder: Path, max_nbytes: int, sound: SoundFiles | None = None) -> None:
        """Opens the cache. `sound`: the files whose bytes need no second check; by default those of this process."""
        self.folder = folder
        self.max_nbytes = max_nbytes
        self._sound = sound or _SOUND

    def fetch(self, sha256: str, nbytes: int, download: Callable[[Path], None]) -> CachedObject | None:
        """Returns the object, from the cache or by `download(path)`. Of concurrent callers one downloads, others wait.

        `download` raises unless the file is the wanted object; it may continue a file that an earlier attempt left.
        Returns None when the object exceeds the bound, or when another process holds it and its download stalls. The
        caller then fetches the object without the cache.
        """
        if nbytes > self.max_nbytes:
            return None
        lock = SharedLock(self.folder / "locks" / sha256)
        path = self.folder / "objects" / sha256
        try:
            is_held = self._hold(lock, path, nbytes, download)
        except BaseException:
            lock.release()
            raise
        return CachedObject(path, lock) if is_held else None

    def _hold(self, lock: SharedLock, path: Path, nbytes: int, download: Callable[[Path], None]) -> bool:
        """Takes the shared lock of a checked object, and downloads the object first if no other process does.

        Returns False, without a lock, after a stall.
        """
        partial = self.folder / "partial" / path.name
        stalled = _Stall(partial)
        while not stalled():
            if lock.take(exclusive=False) and self._sound.holds(path, nbytes):
                _touch(path)
                return True
            if lock.take(exclusive=True):
                if not self._sound.holds(path, nbytes):
                    self._insert(path, partial, download)
                # The lock is held during the eviction, so that this object is not evicted.
                if lock.take(exclusive=False) and self._sound.holds(path, nbytes):
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
        """Removes least recently used objects until the bound holds. Objects in use stay. Safe to call at any time."""
        self._remove_old_partials()
        objects = sorted(_files(self.folder / "objects"), key=lambda entry: entry[1].st_atime)
        excess = sum(found.st_size for _, found in objects) - self.max_nbytes
        for path, found in objects:
            if excess <= 0:
                return
            lock = SharedLock(self.folder / "locks" / path.name)
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
        self._sound.add(path)

    def _remove_old_partials(self) -> None:
        for path, found in _files(self.folder / "partial"):
            # A store may have left a hidden temporary file of its own beside the target of a download.
            lock = SharedLock(self.folder / "locks" / path.name.lstrip(".").partition(".")[0])
            if time.time() - found.st_mtime > _PARTIAL_SECONDS and lock.take(exclusive=True):
                transfers.discard(path)
                lock.remove()


class _Stall:
    """Returns, when called, whether a file has not grown for `_STALL_SECONDS`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nbytes = -1
        self._since = time.monotonic()

    def __call__(self) -> bool:
        nbytes = self._path.stat().st_size if self._path.exists() else 0
        if nbytes != self._nbytes:
            self._nbytes, self._since = nbytes, time.monotonic()
        return time.monotonic() - self._since > _STALL_SECONDS


_FileState = tuple[str, int, int, int, int]


class SoundFiles:
    """The files that this process hashed and whose sha256 equals their name. Safe for threads; bounded.

    A file that has been replaced or written to since is hashed again.
    """

    def __init__(self, max_files: int = 16_384) -> None:
        self._states: LRUCache[_FileState, bool] = LRUCache(max_files)
        self._lock = threading.Lock()

    def add(self, path: Path) -> None:
        """Remembers a file whose bytes were just checked."""
        self._add(_state_of(path, path.stat()))

    def holds(self, path: Path, nbytes: int) -> bool:
        """Returns whether the file exists, has that size, and has the sha256 that is its name."""
        try:
            found = path.stat()
            if found.st_size != nbytes:
                return False
            state = _state_of(path, found)
            with self._lock:
                if state in self._states:
                    return True
            if sha256_of(path) != path.name:
                _logger.warning("the bytes of %s in the cache have changed; the object is fetched again", path)
                return False
        except FileNotFoundError:
            return False
        self._add(state)
        return True

    def _add(self, state: _FileState) -> None:
        with self._lock:
            self._states[state] = True


def _state_of(path: Path, found: os.stat_result) -> _FileState:
    return str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


#: Shared by all caches of this process, since every operation opens the host's cache anew.
_SOUND = SoundFiles()


def _touch(path: Path) -> None:
    """Renews the access time and keeps the modification time, by which `SoundFiles` notices changed bytes."""
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def _files(folder: Path) -> list[tuple[Path, os.stat_result]]:
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            found.append((path, path.stat()))
        except FileNotFoundError:
            continue
    return found


def host_cache() -> ObjectCache | None:
    """Returns the cache of this host that the environment sets; None for a bound of 0. InputError for a bad bound."""
    folder = user_path(os.environ.get(FOLDER_VARIABLE) or _DEFAULT_FOLDER)
    text = os.environ.get(NBYTES_VARIABLE)
    if text is not None:
        if not text.isdecimal():
            raise InputError(
                f"{NBYTES_VARIABLE} is {text!r}: give a number of bytes, or 0 for no cache", variable=NBYTES_VARIABLE
            )
        max_nbytes = int(text)
    else:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        max_nbytes = min(_DEFAULT_NBYTES, shutil.disk_usage(existing).total // _DEFAULT_SHARE)
    return ObjectCache(folder, max_nbytes) if max_nbytes else None
