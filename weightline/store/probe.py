"""The proof that a bucket takes writes and honours create-only."""

from __future__ import annotations

import uuid
from typing import Protocol

from weightline.errors import ObjectExistsError, StorageError

#: Nothing reads what stands here; gc collects what a crash left.
_PROBES = "probes/"


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
