"""Asking again: what every bucket that can be away for a moment is wrapped in.

Only transient errors are repeated, with growing, jittered pauses, for a bounded time. Why each verb may be repeated:

- reads and `delete` change nothing the second time; `put` is for hints; `put_file` has a key that nobody else writes;
- `get_file` continues the file that the cut left; `list` goes on after the last key that was seen;
- `put_if_absent` may have landed although its reply was lost. When a later try of the same call finds the key taken,
  the object is read back: the very bytes of this call mean that this call created it. This is the one place that knows
  of lost replies within a call. (A caller that repeats a whole commit is known by its commit id: chain/commit.py.)

When the time is up, TransientStorageError is raised; a create-only put may then have landed or not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from weightline.errors import NotFoundError, ObjectExistsError, TransientStorageError
from weightline.store.base import ObjectInfo, Store
from weightline.store.probe import prove_create_only

#: How long one operation is repeated. Longer outages are for the caller to wait out.
PATIENCE_SECONDS = 60.0
#: The first pause is up to so long, the next up to twice as long, and so on.
_PAUSE_SECONDS = 0.2
_MAX_PAUSE_SECONDS = 10.0

Result = TypeVar("Result")


class RetryingStore:
    """Implements `Store` over a remote one: repeats what failed for the moment, refuses commits where races lose.

    The first create-only put of a process to a URL proves that the bucket honours it: StorageError when it does not.
    Other writes commit nothing and need no proof, so ranks that only upload do not ask for it. Safe for threads.
    """

    def __init__(
        self, inner: Store, patience_seconds: float = PATIENCE_SECONDS, pause_seconds: float = _PAUSE_SECONDS
    ) -> None:
        self.inner = inner
        self._patience_seconds = patience_seconds
        self._pause_seconds = pause_seconds

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def commit_mode(self) -> str:
        """How the store below makes `put_if_absent` exclusive: one create-only request, where it says nothing else."""
        return str(getattr(self.inner, "commit_mode", "create-only"))

    def get(self, key: str) -> bytes:
        return self._again(lambda: self.inner.get(key))

    def get_file(self, key: str, path: Path) -> None:
        self._again(lambda: self.inner.get_file(key, path))

    def put_if_absent(self, key: str, body: bytes) -> None:
        self.prove()
        self._create(key, body)

    def put(self, key: str, body: bytes) -> None:
        self._again(lambda: self.inner.put(key, body))

    def put_file(self, key: str, path: Path) -> None:
        self._again(lambda: self.inner.put_file(key, path))

    def head(self, key: str) -> ObjectInfo | None:
        return self._again(lambda: self.inner.head(key))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        infos = self.inner.list(prefix, start_after)

        def advance() -> ObjectInfo | None:
            nonlocal infos
            try:
                return next(infos, None)
            except TransientStorageError:
                infos = self.inner.list(prefix, start_after)
                raise

        while (info := self._again(advance)) is not None:
            start_after = info.key
            yield info

    def delete(self, key: str) -> None:
        self._again(lambda: self.inner.delete(key))

    def prove(self) -> None:
        """Once a process and URL: create-only is honoured here. Costs two small puts and a delete."""
        with _proving:
            if self.url in _proven:
                return
            prove_create_only(_Unguarded(self))
            _proven.add(self.url)

    def _create(self, key: str, body: bytes) -> None:
        is_repeated = False

        def once() -> None:
            nonlocal is_repeated
            try:
                self.inner.put_if_absent(key, body)
            except TransientStorageError:
                is_repeated = True
                raise
            except ObjectExistsError:
                if not is_repeated or not self._holds(key, body):
                    raise

        self._again(once)

    def _holds(self, key: str, body: bytes) -> bool:
        try:
            return self.inner.get(key) == body
        except NotFoundError as error:
            raise TransientStorageError(
                f"{key} in {self.url} was said to exist and cannot be read", key=key, url=self.url
            ) from error

    def _again(self, ask: Callable[[], Result]) -> Result:
        retrying = Retrying(
            retry=retry_if_exception_type(TransientStorageError),
            wait=wait_random_exponential(multiplier=self._pause_seconds, max=_MAX_PAUSE_SECONDS),
            stop=stop_after_delay(self._patience_seconds),
            reraise=True,
        )
        return retrying(ask)


class _Unguarded:
    """What the proof itself writes with: lost replies are understood, no proof is asked for."""

    def __init__(self, store: RetryingStore) -> None:
        self.url = store.url
        self.put_if_absent = store._create
        self.delete = store.delete


_proven: set[str] = set()
_proving = threading.Lock()
