"""The interface of a bucket: eight verbs, and what a store reports about how its commits are decided.

Keys are `/`-separated text below the bucket prefix of one chain. Bytes written are seen by every later read. SPEC "What
a store must offer".
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from weightline.errors import CorruptError, InputError, ObjectExistsError, StorageError, TransientStorageError

#: Nothing reads the objects below this prefix. Garbage collection removes those that a crash left.
_PROBES = "probes/"


#: `get` holds an object in memory: a larger one is refused.
MAX_GET_NBYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """The metadata of an object. `modified_at` is by the store's clock."""

    key: str
    nbytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class Contest:
    """A key whose writers may disagree on the winner (`fork`), or whose winner was never published (`unpublished`)."""

    key: str
    kind: Literal["fork", "unpublished"]
    message: str


@runtime_checkable
class Store(Protocol):
    """A bucket prefix. Errors: NotFoundError, ObjectExistsError, TransientStorageError, StorageError."""

    @property
    def url(self) -> str:
        """Returns the URL that opens this store again."""
        ...

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        """Returns the object's bytes. NotFoundError when there is no such object.

        CorruptError, before any byte is read, for an object of more than `max_nbytes`.
        """
        ...

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        """Streams the object to a new local file. A crash leaves a partial file at `path`.

        With `nbytes`, CorruptError, before any byte is read, for an object of another size.
        """
        ...

    def put_if_absent(self, key: str, body: bytes) -> None:
        """Creates the object durably. ObjectExistsError when the key is taken. Every commit is one call of this method.

        When it returns, the object survives a power cut. A crash leaves either nothing or the whole object.
        """
        ...

    def put(self, key: str, body: bytes) -> None:
        """Creates or replaces the object. Use it for hints only, since concurrent writers overwrite each other."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Streams a local file to an object. The object is durable when this returns.

        The key must belong to this writer, or be derived from the content: an existing object is replaced.
        """
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """Returns the object's metadata; None when there is no such object."""
        ...

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Yields the objects whose key starts with `prefix` and comes after `start_after`, in key order."""
        ...

    def delete(self, *keys: str) -> None:
        """Removes the objects, in as few requests as the store can. Safe to repeat: a missing object is no error.

        A crash leaves some of them removed.
        """
        ...

    @property
    def commit_mode(self) -> str:
        """Names the mechanism that makes `put_if_absent` exclusive.

        It is `create-only` where the store decides a conditional put in one request.
        """
        ...

    @property
    def staging_prefix(self) -> str:
        """Returns the prefix of the temporary files that killed writers leave; empty for stores without such files.

        `list` shows these files under this prefix and under no other.
        """
        ...

    def contests(self) -> tuple[Contest, ...]:
        """Returns every key whose winner is in doubt. Reads only.

        Empty for stores where two writers can never both win.
        """
        ...


def require_nbytes(url: str, key: str, nbytes: int, *, at_most: int | None = None, exactly: int | None = None) -> None:
    """Raises CorruptError for an object of `nbytes` that is larger than `at_most`, or has another size than `exactly`.

    Stores call it with the size that the bucket reports, before they read the object.
    """
    if at_most is not None and nbytes > at_most:
        raise CorruptError(
            f"{key} in {url} has {nbytes} bytes, more than the {at_most} that are read", key=key, url=url
        )
    if exactly is not None and nbytes != exactly:
        raise CorruptError(f"{key} in {url} has {nbytes} bytes, not {exactly}", key=key, url=url, nbytes=nbytes)


def checked_key(key: str) -> str:
    """Returns the key unchanged. InputError for a key that could leave the bucket prefix."""
    parts = key.split("/")
    if "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"object key {key!r} is not relative and plain", key=key)
    return key


class DecisiveStore:
    """Base of stores that decide a create-only put by one request, so that no two writers can both win."""

    @property
    def commit_mode(self) -> str:
        return "create-only"

    @property
    def staging_prefix(self) -> str:
        return ""

    def contests(self) -> tuple[Contest, ...]:
        return ()


class Prober(Protocol):
    """The methods of a store that `prove_create_only` calls."""

    @property
    def url(self) -> str: ...

    def put_if_absent(self, key: str, body: bytes) -> None: ...

    def delete(self, key: str) -> None: ...


def read_clock(store: Store) -> datetime:
    """Returns the present time by the store's clock: that of a small object that this writes, and removes.

    A crash leaves the object under `probes/`, for gc.
    """
    key = f"{_PROBES}{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        path = Path(folder) / "probe"
        path.write_bytes(b"weightline")
        store.put_file(key, path)
    try:
        found = store.head(key)
    finally:
        store.delete(key)
    if found is None:
        raise TransientStorageError(f"{store.url} does not show the object {key} that was just put", key=key)
    return found.modified_at


def prove_create_only(store: Prober) -> None:
    """Puts a random key twice. StorageError when the bucket refuses the first put, or accepts the second one.

    Safe to repeat; a crash leaves one small object under `probes/`, which nothing reads.
    """
    key = f"{_PROBES}{uuid.uuid4().hex}"
    store.put_if_absent(key, b"weightline")
    try:
        store.put_if_absent(key, b"weightline again")
    except ObjectExistsError:
        return
    finally:
        store.delete(key)
    raise StorageError(
        f"{store.url} overwrote an object in reply to a create-only put, so two writers could overwrite each other's "
        "versions. Use another store",
        url=store.url,
        key=key,
    )
