"""The store of S3 and S3-compatible services, Google Cloud Storage and Azure, through obstore.

Payloads move in parts, several at a time: an upload holds `_NUM_PARALLEL` parts in memory at most; downloads stream.

**Processes**: obstore's threads do not survive fork(2); a child would wait forever. So once a process has used
obstore, its forked children get StorageError from every store: start workers by spawn or forkserver.

The client repeats parts and reads by itself for a short time. It never repeats a create-only put, since "exists" may
then answer an earlier attempt whose reply was lost; `weightline.store.retry` handles that case.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

from weightline.errors import NotFoundError, ObjectExistsError, StorageError, TransientStorageError
from weightline.store import transfers
from weightline.store.base import MAX_GET_NBYTES, DecisiveStore, ObjectInfo, checked_key, require_nbytes
from weightline.store.objects.errors import translated
from weightline.store.transfers import moved

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

    class Connect(Protocol):
        """Makes a client of a bucket. `in_batches`: it deletes by requests of many objects, where the service can."""

        def __call__(self, options: ClientConfig, retry: RetryConfig, *, in_batches: bool) -> Any: ...


PART_NBYTES = 16 * 1024 * 1024

_NUM_PARALLEL = 6

_PIECE_NBYTES = 1024 * 1024

#: S3 accepts at most 10,000 parts per upload.
_MAX_PARTS = 9_000

#: The timeout applies to all parts in flight together, which suffices for links down to 3 Mbit/s.
_SENDING: ClientConfig = {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(minutes=5)}

_REPEATS: RetryConfig = {
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=2)},
}

_ONCE: RetryConfig = {"max_retries": 0}


@dataclass(frozen=True, slots=True)
class Patience:
    """What a client does by itself about a slow or failing bucket, before the caller sees a TransientStorageError."""

    num_retries: int = 3
    """How often a request that may be repeated is sent again."""
    read_seconds: float = 20.0
    """Requests without a body fail when nothing arrives for this time. It would bound a whole upload, so not there."""


DEFAULT_PATIENCE = Patience()

_logger = logging.getLogger(__name__)

#: The process in which obstore's threads run; None before its first use.
_home_pid: int | None = None


class ObjectStore(DecisiveStore):
    """Implements `Store` on a bucket prefix. Safe for threads; the module's docstring covers processes.

    `connect` makes the obstore clients of the bucket.
    """

    def __init__(self, url: str, prefix: str, connect: Connect, patience: Patience = DEFAULT_PATIENCE) -> None:
        _require_home(url)
        self.url = url
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        reading: ClientConfig = {**_SENDING, "read_timeout": timedelta(seconds=patience.read_seconds)}
        repeats: RetryConfig = {**_REPEATS, "max_retries": patience.num_retries}
        self._client = connect(reading, repeats, in_batches=False)
        self._sender = connect(_SENDING, repeats, in_batches=False)
        self._once = connect(reading, _ONCE, in_batches=False)
        self._connect_in_batches = partial(connect, reading, repeats, in_batches=True)

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        with self._storage_errors(key):
            answer = obstore.get(self._client, self._path(key))
            require_nbytes(self.url, key, int(answer.meta["size"]), at_most=max_nbytes)
            body = bytes(answer.bytes())
        moved(len(body))
        return body

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        """Downloads ranges in parallel, each streamed to its offset. Continues a file that an earlier call left."""
        with self._storage_errors(key):
            found = obstore.head(self._client, self._path(key))
        size = int(found["size"])
        require_nbytes(self.url, key, size, exactly=nbytes)
        identity = json.dumps([self.url, key, found["e_tag"], size])
        start = transfers.num_bytes_done(path, identity)
        ranges = [(at, min(at + PART_NBYTES, size)) for at in range(start, size, PART_NBYTES)]
        with path.open("r+b") as file:
            for end in self._fill(key, file.fileno(), ranges, size):
                transfers.note_done(path, identity, end)
        transfers.finish(path)

    def put_if_absent(self, key: str, body: bytes) -> None:
        with self._storage_errors(key):
            obstore.put(self._once, self._path(key), bytes(body), mode="create", use_multipart=False)
        moved(len(body))

    def put(self, key: str, body: bytes) -> None:
        with self._storage_errors(key):
            obstore.put(self._client, self._path(key), bytes(body), use_multipart=False)
        moved(len(body))

    def put_file(self, key: str, path: Path) -> None:
        nbytes = path.stat().st_size
        part_nbytes = max(PART_NBYTES, -(-nbytes // _MAX_PARTS))
        with path.open("rb") as file, self._storage_errors(key):
            source = cast(BinaryIO, _CountingReader(file))
            obstore.put(
                self._sender, self._path(key), source, chunk_size=part_nbytes, max_concurrency=_NUM_PARALLEL,
                use_multipart=nbytes > part_nbytes,
            )  # fmt: skip

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._storage_errors(key):
                return self._info(obstore.head(self._client, self._path(key)))
        except NotFoundError:
            return None

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yields objects in key order.

        StorageError for a bucket that lists in another order (S3 directory buckets), since tips would be wrong.
        """
        folder = prefix.rpartition("/")[0]
        # Clients list whole folders: start right before the prefix, stop right after it.
        offset = max(start_after, prefix[:-1] if prefix[len(folder) + 1 :] else "")
        last = ""
        for info in self._pages(prefix, folder, offset):
            if info.key <= last:
                raise StorageError(f"{self.url} does not list in key order: use another bucket", url=self.url)
            last = info.key
            if info.key.startswith(prefix) and info.key > start_after:
                yield info
            elif info.key > prefix and not info.key.startswith(prefix):
                return

    def delete(self, *keys: str) -> None:
        """Several keys go into one request where the service takes that (S3: a thousand), else one by one."""
        if len(keys) > 1:
            try:
                with self._storage_errors(keys[0]):
                    obstore.delete(self._in_batches, [self._path(key) for key in keys])
                return
            except TransientStorageError:
                raise
            except (NotFoundError, StorageError) as error:
                _logger.debug("%s deletes one by one: %s", self.url, error)
        for key in keys:
            with suppress(NotFoundError), self._storage_errors(key):
                obstore.delete(self._client, self._path(key))

    def _pages(self, prefix: str, folder: str, offset: str) -> Iterator[ObjectInfo]:
        with self._storage_errors(prefix):
            pages = iter(
                obstore.list(self._client, f"{self._root}{folder}", offset=f"{self._root}{offset}" if offset else None)
            )
        while True:
            with self._storage_errors(prefix):
                page = next(pages, None)
            if page is None:
                return
            yield from map(self._info, page)

    def _fill(self, key: str, descriptor: int, ranges: Sequence[tuple[int, int]], nbytes: int) -> Iterator[int]:
        """Fetches the ranges to their offsets in a file. Yields the end of the complete first part.

        No thread writes to the file after this generator has ended.
        """
        tags: set[str | None] = set()
        pending = [self._readers.submit(self._read_range, key, descriptor, one, nbytes, tags) for one in ranges]
        try:
            for future, (_, end) in zip(pending, ranges, strict=True):
                future.result()
                yield end
        finally:
            for future in pending:
                future.cancel()
            wait(pending)

    def _read_range(
        self, key: str, descriptor: int, wanted: tuple[int, int], nbytes: int, tags: set[str | None]
    ) -> None:
        at, end = wanted
        with self._storage_errors(key):
            result = obstore.get(self._client, self._path(key), options={"range": wanted})
            tags.add(result.meta["e_tag"])
            if result.meta["size"] != nbytes or len(tags) > 1:
                raise TransientStorageError(f"{key} in {self.url} changed while it was read", key=key, url=self.url)
            for piece in result.stream(min_chunk_size=_PIECE_NBYTES):
                at += os.pwrite(descriptor, piece, at)
                moved(len(piece))
        if at != end:
            raise TransientStorageError(
                f"{self.url} sent {at - wanted[0]} of the bytes {wanted[0]} to {end} of {key}", key=key, url=self.url
            )

    @cached_property
    def _in_batches(self) -> Any:
        """Returns the client that deletes many objects by one request. Few processes need it."""
        return self._connect_in_batches()

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        """Returns the threads that all downloads of this store share, which bounds their memory together."""
        return ThreadPoolExecutor(_NUM_PARALLEL, thread_name_prefix="weightline-read")

    def _path(self, key: str) -> str:
        return f"{self._root}{checked_key(key)}"

    def _info(self, found: Any) -> ObjectInfo:
        return ObjectInfo(found["path"].removeprefix(self._root), int(found["size"]), found["last_modified"])

    @contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        """Translates errors of one call of the client. The client raises FileNotFoundError for a missing object."""
        _require_home(self.url)
        try:
            yield
        except AlreadyExistsError as error:
            raise ObjectExistsError(f"{key} exists in {self.url}", key=key, url=self.url) from error
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise translated(str(error), self.url, key, is_refused=True) from error
        except FileNotFoundError as error:
            raise translated(str(error), self.url, key, is_missing=True) from error
        except BaseError as error:
            raise translated(str(error), self.url, key) from error


class _CountingReader:
    """A file that reports every read to the watchers of transfers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, nbytes: int = -1) -> bytes:
        body = self._file.read(nbytes)
        moved(len(body))
        return body


def _require_home(url: str) -> None:
    global _home_pid
    if _home_pid is None:
        _home_pid = os.getpid()
    elif _home_pid != os.getpid():
        raise StorageError(
            f"{url}: this process was forked from process {_home_pid}, which had used a bucket before: the bucket's "
            "client would hang here. Start workers by spawn: multiprocessing.get_context('spawn')",
            url=url,
        )
