"""Fetches objects of a chain to local files, whose size and sha256 are checked before they are read."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cachetools import LRUCache

from weightline.errors import CorruptError, DigestMismatchError
from weightline.files import link_or_copy, sha256_of
from weightline.format.manifest import StoredObject
from weightline.format.payload import Payload, open_payload
from weightline.store import Store, transfers
from weightline.store.cache import CachedObject, ObjectCache, host_cache
from weightline.store.open import is_remote

_NUM_PREFETCHING = 4
#: Objects of the cache that a fetcher holds by their locks, a file descriptor each. It keeps further ones itself.
_MAX_HELD = 64
#: Of all payloads that stay open.
_MAX_OPENED_SEGMENTS = 1 << 19
_logger = logging.getLogger(__name__)


def fetch_object(store: Store, wanted: StoredObject, path: Path) -> Path:
    """Downloads to `path` through a temporary name beside it, and checks the file. Safe to repeat.

    DigestMismatchError when size or sha256 differ from the manifest's; then there is no file at `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        download_object(store, wanted, partial)
        return partial.replace(path)
    finally:
        transfers.discard(partial)


def download_object(store: Store, wanted: StoredObject, partial: Path) -> None:
    """Downloads to `partial`, or continues an earlier download there, and checks the file. Safe to repeat.

    DigestMismatchError when size or sha256 differ from the manifest's; then there is no file left. After any other
    error the next call may continue.
    """
    try:
        store.get_file(wanted.key, partial, wanted.nbytes)
    except CorruptError as error:
        transfers.discard(partial)
        raise DigestMismatchError(
            f"{error} as its manifest says", what=wanted.key, expected=wanted.nbytes, actual=error.facts.get("nbytes")
        ) from error
    actual: tuple[int, str] = (partial.stat().st_size, sha256_of(partial))
    expected = (wanted.nbytes, wanted.sha256)
    if actual != expected:
        transfers.discard(partial)
        raise DigestMismatchError(
            f"{wanted.key} has {actual[0]} bytes with sha256 {actual[1]}, its manifest says {expected[0]} bytes "
            f"with {expected[1]}",
            what=wanted.key,
            expected=expected,
            actual=actual,
        )


class Fetcher:
    """Fetches and checks each object of a chain once, and keeps it in a folder of its own or in this host's cache.

    For one thread; `prefetch` uses threads of its own.
    """

    def __init__(self, store: Store, folder: Path, cache: ObjectCache | None = None) -> None:
        self._store = store
        self._folder = folder
        self._cache = cache
        self._cached: dict[str, CachedObject] = {}
        self._ahead: dict[str, Future[Path]] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._opened: LRUCache[str, Payload] = LRUCache(_MAX_OPENED_SEGMENTS, lambda payload: 1 + len(payload.segments))
        self.broken_shortcuts: set[str] = set()
        """Keys of shortcuts that failed in this operation: readers plan without them."""
        self.seconds = 0.0
        """For which `fetch` kept its callers waiting."""

    def open(self, wanted: StoredObject) -> Payload:
        """Returns the opened payload. One that is named several times (ranks without changes) is opened once."""
        payload = self._opened.get(wanted.sha256)
        if payload is None:
            payload = open_payload(self.fetch(wanted))
            if 1 + len(payload.segments) <= _MAX_OPENED_SEGMENTS:
                self._opened[wanted.sha256] = payload
        return payload

    def fetch(self, wanted: StoredObject) -> Path:
        """Returns the object's local file, which exists while the fetcher is open."""
        started, future = time.perf_counter(), self._ahead.pop(wanted.sha256, None)
        try:
            return future.result() if future is not None else self._obtain(wanted)
        finally:
            self.seconds += time.perf_counter() - started

    def prefetch(self, wanted: Iterable[StoredObject]) -> None:
        """Starts to fetch objects of a remote bucket, several at a time. `fetch` raises their errors."""
        if not is_remote(self._store):
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_NUM_PREFETCHING, thread_name_prefix="weightline-fetch")
        for one in wanted:
            if one.sha256 not in self._ahead and self._found(one) is None:
                self._ahead[one.sha256] = self._threads.submit(self._obtain, one)

    def close(self) -> None:
        """Ends the fetches that are under way, and allows the eviction of objects from the cache."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for cached in self._cached.values():
            cached.release()

    def _found(self, wanted: StoredObject) -> Path | None:
        if wanted.sha256 in self._cached:
            return self._cached[wanted.sha256].path
        path = self._folder / wanted.sha256
        return path if path.exists() else None

    def _obtain(self, wanted: StoredObject) -> Path:
        path = self._found(wanted) or self._from_cache(wanted)
        return path or fetch_object(self._store, wanted, self._folder / wanted.sha256)

    def _from_cache(self, wanted: StoredObject) -> Path | None:
        if self._cache is None:
            return None
        try:
            cached = self._cache.fetch(
                wanted.sha256, wanted.nbytes, lambda path: download_object(self._store, wanted, path)
            )
        except OSError as error:
            _logger.warning("the cache %s cannot be used, fetching without it: %s", self._cache.folder, error)
            return None
        if cached is None:
            return None
        if len(self._cached) >= _MAX_HELD:
            return self._keep(cached, self._folder / wanted.sha256)
        self._cached[wanted.sha256] = cached
        return cached.path

    def _keep(self, cached: CachedObject, path: Path) -> Path:
        """Links or copies the object into the fetcher's folder and releases its lock, which holds a file descriptor."""
        partial = path.with_name(f".{path.name}.kept")
        try:
            link_or_copy(cached.path, partial)
            return partial.replace(path)
        finally:
            cached.release()


@contextmanager
def fetching(store: Store, cache: ObjectCache | None = None, *, is_cached: bool = True) -> Iterator[Fetcher]:
    """Opens a fetcher for one operation and removes its folder at the end.

    Objects of remote buckets are kept in this host's cache, unless `is_cached` is false: then every object is read from
    the bucket.
    """
    if cache is None and is_cached and is_remote(store):
        cache = host_cache()
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        fetcher = Fetcher(store, Path(folder), cache)
        try:
            yield fetcher
        finally:
            fetcher.close()
