"""One URL opens a bucket."""

from __future__ import annotations

import uuid
from pathlib import Path
from urllib.parse import unquote, urlsplit

from weightline.errors import InputError, ObjectExistsError, StorageError
from weightline.store.base import Store
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore

#: Nothing reads what stands here; gc collects what a crash left.
_PROBES = "probes/"


def open_store(url: str) -> Store:
    """The store that the URL names. Nothing is read or written yet; InputError when no store has that scheme."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{url}: a file URL has three slashes, as in file:///data/bucket/chain", url=url)
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "memory":
        return MemoryStore.named(url)
    if parts.scheme == "":
        return LocalStore(Path(url).expanduser())
    raise InputError(f"{url}: no store for {parts.scheme}://. Use file:///path, a plain path or memory://name", url=url)


def check_writable(store: Store) -> None:
    """Prove, before any work, that the bucket takes a create-only put and honours it. StorageError otherwise.

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
