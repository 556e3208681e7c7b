"""Opens the store that a URL names. Clients of remote stores are imported on the first use of their scheme."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from weightline.errors import InputError, NotFoundError, StorageError
from weightline.files import user_path
from weightline.store.base import Store, checked_key, prove_create_only
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.store.retry import PATIENCE_SECONDS, RetryingStore

_OBJECT_STORES = ("s3", "gs", "az")
#: The characters that bucket names of all services are made of. Azure has a container named `$root`.
_BUCKET_NAME = re.compile(r"[A-Za-z0-9$][A-Za-z0-9._-]*")


def open_store(url: str, patience_seconds: float | None = None) -> Store:
    """Returns the store that the URL names. Reads and writes nothing. InputError for an empty or unsupported URL.

    Remote stores repeat an operation that fails with a transient error for up to `patience_seconds`, by default
    `weightline.store.retry.PATIENCE_SECONDS`. docs/buckets.md lists their settings and credentials.
    """
    patience_seconds = PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    if not url.strip() or any(character < " " or character == "\x7f" for character in url):
        raise InputError(f"{url!r} names no bucket: it is empty, or has control characters", url=url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise InputError(f"{url}: {error}", url=url) from error
    if parts.scheme == "file":
        return LocalStore(_folder_of(url, parts))
    if parts.scheme == "memory":
        return MemoryStore.named(url)
    if parts.scheme == "":
        return LocalStore(user_path(url))
    if parts.scheme in _OBJECT_STORES:
        return RetryingStore(_open_objects(url, parts), patience_seconds)
    if parts.scheme == "hf":
        from weightline.store.hub.store import open_hub

        return RetryingStore(open_hub(url), patience_seconds)
    raise InputError(
        f"{url}: no store for {parts.scheme}://. Use file:///path, a plain path, hf://buckets/owner/name, s3://bucket, "
        "gs://bucket, az://container or memory://name",
        url=url,
    )


def is_remote(store: Store) -> bool:
    """Returns whether the store is reached over a network. Objects of such stores are cached and prefetched."""
    return urlsplit(store.url).scheme not in ("", "file", "memory")


def check_writable(store: Store) -> None:
    """Proves, before any work, that the bucket accepts a create-only put and honors it. StorageError otherwise.

    Safe to repeat; a crash leaves one small object under `probes/`, which nothing reads. A remote bucket is probed once
    per process.
    """
    if isinstance(store, RetryingStore):
        store.prove()
        return
    try:
        prove_create_only(store)
    except NotFoundError as error:
        raise StorageError(f"{store.url}: this folder cannot be created", url=store.url) from error


def _folder_of(url: str, parts: SplitResult) -> Path:
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InputError(f"{url}: a file URL has three slashes, as in file:///data/bucket/chain", url=url)
    if "?" in url or "#" in url:
        raise InputError(f"{url}: in a file URL, '?' and '#' are written %3F and %23. A plain path takes them", url=url)
    return Path(unquote(parts.path))


def _open_objects(url: str, parts: SplitResult) -> Store:
    if not _BUCKET_NAME.fullmatch(parts.netloc) or "?" in url or "#" in url:
        raise InputError(f"{url}: name a bucket and a prefix, as in {parts.scheme}://bucket/chains/my-model", url=url)
    from weightline.store.objects import clients

    openers = {"s3": clients.open_s3, "gs": clients.open_gs, "az": clients.open_az}
    prefix = unquote(parts.path).removeprefix("/").rstrip("/")
    return openers[parts.scheme](url.rstrip("/"), parts.netloc, checked_key(prefix) if prefix else "")
