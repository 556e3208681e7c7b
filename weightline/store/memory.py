"""A bucket in this process's memory: `memory://name`. Meant for tests and trials."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from weightline.errors import NotFoundError, ObjectExistsError
from weightline.store.base import MAX_GET_NBYTES, DecisiveStore, ObjectInfo, checked_key, require_nbytes

_shelves: dict[str, MemoryStore] = {}
_shelves_lock = threading.Lock()


class MemoryStore(DecisiveStore):
    """Implements `Store`. Thread-safe; gone when the process ends."""

    def __init__(self, url: str = "memory://") -> None:
        self.url = url
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, url: str) -> MemoryStore:
        """Returns the store of this process with that URL; creates it on the first call."""
        with _shelves_lock:
            return _shelves.setdefault(url, cls(url))

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        body = self._body(key)
        require_nbytes(self.url, key, len(body), at_most=max_nbytes)
        return body

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        body = self._body(key)
        require_nbytes(self.url, key, len(body), exactly=nbytes)
        path.write_bytes(body)

    def put_if_absent(self, key: str, body: bytes) -> None:
        with self._lock:
            if checked_key(key) in self._objects:
                raise ObjectExistsError(f"{key} exists in {self.url}", key=key, url=self.url)
            self._objects[key] = (bytes(body), datetime.now(UTC))

    def put(self, key: str, body: bytes) -> None:
        with self._lock:
            self._objects[checked_key(key)] = (bytes(body), datetime.now(UTC))

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def head(self, key: str) -> ObjectInfo | None:
        with self._lock:
            found = self._objects.get(key)
        return ObjectInfo(key, len(found[0]), found[1]) if found else None

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        with self._lock:
            rows = [ObjectInfo(k, len(b), t) for k, (b, t) in self._objects.items()]
        yield from sorted((r for r in rows if r.key.startswith(prefix) and r.key > start_after), key=lambda r: r.key)

    def delete(self, *keys: str) -> None:
        with self._lock:
            for key in keys:
                self._objects.pop(key, None)

    def _body(self, key: str) -> bytes:
        with self._lock:
            if key not in self._objects:
                raise NotFoundError(f"no object {key} in {self.url}", key=key)
            return self._objects[key][0]
