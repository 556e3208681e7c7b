"""One URL opens a bucket. Clients of remote stores are imported when a URL asks for them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from weightline.errors import InputError
from weightline.store.base import Store
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.store.probe import prove_create_only
from weightline.store.retry import RetryingStore

_OBJECT_STORES = ("s3", "gs", "az")


def open_store(url: str) -> Store:
    """The store that the URL names. Nothing is read or written yet; InputError when no store has that scheme.

    Remote stores ask again when a bucket is away for a moment; docs/buckets.md lists their settings and credentials.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"{url}: a file URL has three slashes, as in file:///data/bucket/chain", url=url)
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "memory":
        return MemoryStore.named(url)
    if parts.scheme == "":
        return LocalStore(Path(url).expanduser())
    if parts.scheme in _OBJECT_STORES:
        return RetryingStore(_open_objects(url, parts))
    if parts.scheme == "hf":
        from weightline.store.hub import open_hub

        return RetryingStore(open_hub(url))
    raise InputError(
        f"{url}: no store for {parts.scheme}://. Use file:///path, a plain path, hf://buckets/owner/name, s3://bucket, "
        "gs://bucket, az://container or memory://name",
        url=url,
    )


def is_remote(store: Store) -> bool:
    """Whether its objects come over a network: worth keeping on this host, and worth fetching several at a time."""
    return urlsplit(store.url).scheme not in ("", "file", "memory")


def check_writable(store: Store) -> None:
    """Prove, before any work, that the bucket takes a create-only put and honours it. StorageError otherwise.

    Safe to repeat; a crash leaves one small object under `probes/`, which nothing reads. A remote bucket is asked once
    a process.
    """
    if isinstance(store, RetryingStore):
        store.prove()
    else:
        prove_create_only(store)


def _open_objects(url: str, parts: SplitResult) -> Store:
    if not parts.netloc or parts.query or parts.fragment or "@" in parts.netloc:
        raise InputError(f"{url}: name a bucket and a prefix, as in {parts.scheme}://bucket/chains/my-model", url=url)
    from weightline.store import objects

    openers = {"s3": objects.open_s3, "gs": objects.open_gs, "az": objects.open_az}
    return openers[parts.scheme](url.rstrip("/"), parts.netloc, unquote(parts.path))
