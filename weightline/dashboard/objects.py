"""Keeps the small immutable objects below a prefix of a bucket. Each is fetched and parsed once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from typing import Generic, TypeVar

from weightline.errors import NotFoundError
from weightline.store import Store

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


class KeptObjects(Generic[Parsed]):
    """The objects below `prefix`, as of the last `refresh`. For one thread at a time."""

    def __init__(self, store: Store, prefix: str, parse: Callable[[str, bytes], Parsed | None], pool: Executor) -> None:
        self._store = store
        self.prefix = prefix
        self._parse = parse
        self._pool = pool
        self.found: dict[str, Parsed | None] = {}
        """The parsed objects by key; None for an object that could not be parsed."""

    def refresh(self, start_after: str = "", limit: int = 2_000) -> tuple[bool, bool]:
        """Lists the prefix, drops objects that are gone, and fetches at most `limit` new ones, newest keys first.

        Returns (whether anything changed, whether more objects are to be fetched). A StorageError keeps known objects.
        """
        listed = {info.key for info in self._store.list(self.prefix, start_after)}
        gone = [key for key in self.found if key > start_after and key not in listed]
        for key in gone:
            del self.found[key]
        fresh = sorted(listed - self.found.keys(), reverse=True)
        for key, raw in fetch_all(self._store, fresh[:limit], self._pool):
            self.found[key] = self._parsed(key, raw)
        return bool(gone or fresh), len(fresh) > limit

    def _parsed(self, key: str, raw: bytes) -> Parsed | None:
        """Returns the object; None for one that cannot be parsed, which must not hide the others."""
        try:
            return self._parse(key, raw)
        except Exception:
            logger.exception("%s of %s cannot be read", key, self._store.url)
            return None

    def values(self) -> Iterator[Parsed]:
        """Yields the objects that could be parsed, in key order."""
        return (value for _, value in sorted(self.found.items()) if value is not None)


def fetch_all(store: Store, keys: Iterable[str], pool: Executor) -> Iterator[tuple[str, bytes]]:
    """Yields (key, bytes) of every object, fetched several at a time. Objects that no longer exist are left out."""

    def fetch(key: str) -> tuple[str, bytes | None]:
        try:
            return key, store.get(key)
        except NotFoundError:
            return key, None

    return ((key, raw) for key, raw in pool.map(fetch, keys) if raw is not None)
