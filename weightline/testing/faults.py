"""Stores that fail as planned, for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from weightline.errors import TransientStorageError
from weightline.store import ObjectInfo, Store
from weightline.store.base import MAX_GET_NBYTES, Contest


class FaultStore:
    """Implements `Store` over another one. Before each operation, `plan(number, verb, key)` may raise.

    `number` counts the operations from 0. An exception simulates a bucket, a network or a process that fails there.
    """

    def __init__(self, inner: Store, plan: Callable[[int, str, str], None]) -> None:
        self.inner = inner
        self.plan = plan
        self.num_operations = 0

    @property
    def url(self) -> str:
        return self.inner.url

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        self._next("get", key)
        return self.inner.get(key, max_nbytes)

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        self._next("get_file", key)
        self.inner.get_file(key, path, nbytes)

    def put_if_absent(self, key: str, body: bytes) -> None:
        self._next("put_if_absent", key)
        self.inner.put_if_absent(key, body)

    def put(self, key: str, body: bytes) -> None:
        self._next("put", key)
        self.inner.put(key, body)

    def put_file(self, key: str, path: Path) -> None:
        self._next("put_file", key)
        self.inner.put_file(key, path)

    def head(self, key: str) -> ObjectInfo | None:
        self._next("head", key)
        return self.inner.head(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        self._next("list", prefix)
        return self.inner.list(prefix, start_after)

    def delete(self, *keys: str) -> None:
        """Each key is an operation of its own, so that a fault can leave any part of them removed."""
        for key in keys:
            self._next("delete", key)
            self.inner.delete(key)

    @property
    def commit_mode(self) -> str:
        return self.inner.commit_mode

    @property
    def staging_prefix(self) -> str:
        return self.inner.staging_prefix

    def contests(self) -> tuple[Contest, ...]:
        return self.inner.contests()

    def _next(self, verb: str, key: str) -> None:
        number, self.num_operations = self.num_operations, self.num_operations + 1
        self.plan(number, verb, key)


def failing(*, verb: str, key_prefix: str, times: int) -> Callable[[int, str, str], None]:
    """Returns a plan by which the first `times` operations of a verb under a prefix raise TransientStorageError."""
    left = times

    def plan(number: int, this_verb: str, key: str) -> None:
        nonlocal left
        if left and this_verb == verb and key.startswith(key_prefix):
            left -= 1
            raise TransientStorageError(f"{verb} of {key} failed, as planned", key=key)

    return plan
