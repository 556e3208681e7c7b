"""Objects that were fetched from remote buckets, kept on this host for the next reader.

    <folder>/objects/<sha256>    whole and checked when it got its name
    <folder>/partial/<sha256>    being downloaded; a later attempt continues it
    <folder>/locks/<sha256>      exclusive: who downloads or evicts; shared: who reads

Content-addressed: an object of any bucket is found by its sha256. Bounded: least recently used objects go first, by the
modification time, which every use renews; objects in use stay, even beyond the bound. Locks die with their process, so
a crash leaves nothing but a partial file. A hit is checked by its size; whoever reads weights checks their digests.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from weightline.errors import InputError
from weightline.store import resume
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
        path, partial = self.folder / "objects" / sha256, self.folder / "partial" / sha256
        stalled = _Stall(partial)
        is_held = False
        try:
            while not (is_held or stalled()):
                if lock.take(exclusive=False) and _is_whole(path, nbytes):
                    os.utime(path)
                    is_held = True
                elif lock.take(exclusive=True):
                    if not _is_whole(path, nbytes):
                        self._insert(path, partial, download)
                    # Held while others make room, so that this object is not what they remove.
                    is_held = lock.take(exclusive=False) and _is_whole(path, nbytes)
                    self.evict()
                else:
                    time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))
        finally:
            if not is_held:
                lock.release()
        return CachedObject(path, lock) if is_held else None

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

    def _remove_old_partials(self) -> None:
        for path, found in _files(self.folder / "partial"):
            lock = FileLock(self.folder / "locks" / path.name.partition(".")[0])
            if time.time() - found.st_mtime > _PARTIAL_SECONDS and lock.take(exclusive=True):
                resume.discard(path)
                lock.release()


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


def _is_whole(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except FileNotFoundError:
        return False


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
