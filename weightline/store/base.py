"""The interface of a bucket: eight verbs, and what a store reports about how its commits are decided.

Keys are `/`-separated text below the bucket prefix of one chain. Bytes written are seen by every later read. SPEC "What
a store must offer".
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from weightline.errors import InputError, ObjectExistsError, StorageError

#: Nothing reads what stands here; gc collects what a crash left.
_PROBES = "probes/"


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store knows of an object without its bytes. `modified_at` is the store's clock."""

    key: str
    nbytes: int
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class Contest:
    """A key about which several writers may believe different things, or that was won and never published."""

    key: str
    kind: Literal["fork", "unpublished"]
    message: str


@runtime_checkable
class Store(Protocol):
    """A bucket prefix. Errors: NotFoundError, ObjectExistsError, TransientStorageError, StorageError."""

    @property
    def url(self) -> str:
        """The URL that opens this store again."""
        ...

    def get(self, key: str) -> bytes:
        """The object's bytes. NotFoundError when there is none."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Stream the object to a new local file. A crash leaves a partial file at `path`."""
        ...

    def put_if_absent(self, key: str, body: bytes) -> None:
        """Create the object durably, or raise ObjectExistsError: the one primitive that commits.

        When it returns, the object survives a power cut. A crash leaves either nothing or the whole object.
        """
        ...

    def put(self, key: str, body: bytes) -> None:
        """Create or replace: for hints only."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Stream a local file to an object under a key that nobody else writes. Durable when it returns."""
        ...

    def head(self, key: str) -> ObjectInfo | None:
        """What is known of the object, or None."""
        ...

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """The objects whose key starts with `prefix` and comes after `start_after`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object. Safe to repeat: a missing object is no error."""
        ...

    @property
    def commit_mode(self) -> str:
        """What makes `put_if_absent` exclusive: `create-only` where it is one request that the store honors."""
        ...

    @property
    def staging_prefix(self) -> str:
        """The prefix below which a writer that was killed leaves bytes that no key names; empty where there is none.

        `list` shows them under this prefix and under no other.
        """
        ...

    def contests(self) -> tuple[Contest, ...]:
        """Every key in doubt, where writers can, in the worst case, both win. Reads only."""
        ...


def checked_key(key: str) -> str:
    """The key itself when it stays inside the bucket prefix; InputError otherwise."""
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
    """The part of a store that the proof needs."""

    @property
    def url(self) -> str: ...

    def put_if_absent(self, key: str, body: bytes) -> None: ...

    def delete(self, key: str) -> None: ...


def prove_create_only(store: Prober) -> None:
    """Put a random key twice. StorageError when the bucket takes no write, or takes the second one.

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
        f"{store.url} overwrote an object although asked to create only: two writers could lose each other's versions. "
        "Use another store",
        url=store.url,
        key=key,
    )
