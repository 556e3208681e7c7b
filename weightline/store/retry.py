"""Repeats operations of remote stores that fail with a transient error.

Pauses between attempts grow and are jittered; `_Patience` bounds the time. Each method is safe to repeat:

- Reads and `delete` change nothing the second time. `put` is for hints. `put_file` writes a key of this writer alone.
- `get_file` continues the partial file of the failed attempt. `list` continues after the last key that it yielded.
- `put_if_absent` may have created the object although its reply was lost, and S3 answers 409
  (ConditionalRequestConflict) when requests collided and none won. So when the store reports that the key exists, the
  object is read back: after a failed attempt, bytes equal to those of this call mean that this call created it, and a
  missing object means that the put must be repeated. Lost replies within a call are handled here only. A caller that
  repeats a whole commit recognizes its earlier attempt by the commit id (chain/write/commit.py).

After the deadline TransientStorageError is raised. A create-only put may then have created the object or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from weightline.errors import NotFoundError, ObjectExistsError, TransientStorageError
from weightline.store.base import MAX_GET_NBYTES, Contest, ObjectInfo, Store, prove_create_only

#: Retry deadline of one operation, from its first failure. Callers handle longer outages.
PATIENCE_SECONDS = 60.0
#: An attempt that ran longer than this before it failed, such as a large file over an unstable link, resets the
#: deadline, since the bucket was reachable meanwhile.
_LONG_TRY_SECONDS = 60.0
#: An operation is given up after this many such attempts.
_MAX_LONG_TRIES = 5
#: Upper bound of the first pause. The bound doubles with every further pause, up to `_MAX_PAUSE_SECONDS`.
_PAUSE_SECONDS = 0.2
_MAX_PAUSE_SECONDS = 10.0

Result = TypeVar("Result")


class RetryingStore:
    """Implements `Store` over a remote store and repeats operations that fail with TransientStorageError.

    The first create-only put of a process to a URL proves that the bucket honors it; StorageError when it does not.
    Other writes commit nothing and need no proof, so ranks that only upload do not pay for it. Safe for threads.
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
        return self.inner.commit_mode

    @property
    def staging_prefix(self) -> str:
        return self.inner.staging_prefix

    def contests(self) -> tuple[Contest, ...]:
        return self._again(self.inner.contests)

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        return self._again(lambda: self.inner.get(key, max_nbytes))

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        self._again(lambda: self.inner.get_file(key, path, nbytes))

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

    def delete(self, *keys: str) -> None:
        self._again(lambda: self.inner.delete(*keys))

    def prove(self) -> None:
        """Proves once per process and URL that the bucket honors create-only puts. StorageError when it does not.

        Costs two small puts, a get and a delete.
        """
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
                if self._read_back(key) != body or not is_repeated:
                    raise

        self._again(once)

    def _read_back(self, key: str) -> bytes:
        try:
            return self.inner.get(key)
        except NotFoundError as error:
            raise TransientStorageError(
                f"{self.url} reported that {key} exists, and it cannot be read", key=key, url=self.url
            ) from error

    def _again(self, operation: Callable[[], Result]) -> Result:
        patience = _Patience(self._patience_seconds)
        retrying = Retrying(
            retry=retry_if_exception_type(TransientStorageError),
            wait=wait_random_exponential(multiplier=self._pause_seconds, max=_MAX_PAUSE_SECONDS),
            before=patience.begin,
            stop=patience.is_over,
            reraise=True,
        )
        return retrying(operation)


class _Patience:
    """The retry deadline of one operation. It starts at the first failure; a long attempt resets it.

    So a large transfer survives as many interruptions as a small one. `_MAX_LONG_TRIES` bounds the number of resets.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun_at = 0.0
        self._away_since: float | None = None
        self._num_long = 0

    def begin(self, _: RetryCallState) -> None:
        self._begun_at = time.monotonic()

    def is_over(self, _: RetryCallState) -> bool:
        now = time.monotonic()
        if now - self._begun_at > _LONG_TRY_SECONDS:
            self._num_long += 1
            self._away_since = now
        elif self._away_since is None:
            self._away_since = self._begun_at
        return self._num_long >= _MAX_LONG_TRIES or now - self._away_since >= self._seconds


class _Unguarded:
    """The store that the proof writes to: it handles lost replies as usual and starts no further proof."""

    def __init__(self, store: RetryingStore) -> None:
        self.url = store.url
        self.put_if_absent = store._create
        self.delete = store.delete


_proven: set[str] = set()
_proving = threading.Lock()
