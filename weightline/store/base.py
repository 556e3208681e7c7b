"""What a bucket must offer: eight verbs. SPEC "What a store must offer".

Keys are `/`-separated text below the bucket prefix of one chain. Bytes written are seen by every later read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol, runtime_checkable

from weightline.errors import InputError


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object without its bytes. `modified_at` is the store's clock."""

    key: str
    nbytes: int
    modified_at: datetime


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


def checked_key(key: str) -> str:
    """The key itself when it stays inside the bucket prefix; InputError otherwise."""
    parts = key.split("/")
    if "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise InputError(f"object key {key!r} is not relative and plain", key=key)
    return key
