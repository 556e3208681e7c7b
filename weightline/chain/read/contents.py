"""Reads the objects that headers name by their sha256: layouts, lists of digests, lists of assets and provenances.

Their keys name their content, so each is fetched once and shared by all versions that have it. Caches are bounded by
bytes. SPEC "Objects and keys".
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TypeVar

from cachetools import LRUCache

from weightline.errors import CorruptError, DigestMismatchError
from weightline.format import keys
from weightline.format.documents import MAX_LIST_NBYTES
from weightline.format.header import LayoutRef, ObjectRef, unpack_assets, unpack_provenance
from weightline.format.manifest import AssetRef
from weightline.format.state_digests import DIGEST_NBYTES, DigestArray, unpack_list
from weightline.format.tensor_layout import Layout, unpack_layout
from weightline.store import Store

#: Bytes of memory. A model of 36,000 tensors has a layout of about 14 MB and lists of 0.6 MB.
_MAX_LAYOUT_NBYTES = 1 << 27
_MAX_DIGESTS_NBYTES = 1 << 24
_MAX_SMALL_NBYTES = 1 << 22
#: Memory of a parsed list of assets or provenance, over the bytes of its object.
_PARSED_FACTOR = 4

Value = TypeVar("Value")


class BoundedCache:
    """Keeps values up to a number of bytes and drops the least recently used ones. Safe to share between threads.

    A value that is larger than all the room is kept alone: a model whose layout is so large is read once, too.
    """

    def __init__(self, max_nbytes: int) -> None:
        self._max_nbytes = max_nbytes
        self._kept: LRUCache[Hashable, tuple[object, int]] = LRUCache(max_nbytes, lambda entry: entry[1])
        self._lock = Lock()

    def get(self, key: Hashable) -> object | None:
        """Returns the value; None for one that was never put or is gone."""
        with self._lock:
            found = self._kept.get(key)
        return None if found is None else found[0]

    def put(self, key: Hashable, value: object, nbytes: int) -> None:
        """Keeps a value of so many bytes."""
        with self._lock:
            self._kept[key] = value, min(nbytes, self._max_nbytes)

    def drop(self, key: Hashable) -> None:
        """Forgets a value. Safe to repeat."""
        with self._lock:
            self._kept.pop(key, None)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all kept values."""
        return int(self._kept.currsize)


class Contents:
    """The shared objects of a bucket. Chain objects of one bucket may share it. Safe to share between threads.

    Raises NotFoundError for an object that is missing, DigestMismatchError for other bytes than the header's, and
    ManifestError for bytes that break the format.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layouts = BoundedCache(_MAX_LAYOUT_NBYTES)
        self._digests = BoundedCache(_MAX_DIGESTS_NBYTES)
        self._small = BoundedCache(_MAX_SMALL_NBYTES)

    def layout(self, ref: LayoutRef) -> Layout:
        """Returns the layout."""
        found = self._layouts.get(ref.sha256)
        if isinstance(found, Layout) and len(found) == ref.num_tensors:
            return found
        raw = self._get(keys.layout(ref.sha256), ref.sha256, ref.nbytes)
        return self.keep_layout(ref.sha256, unpack_layout(raw, ref.num_tensors))

    def keep_layout(self, sha256: str, layout: Layout) -> Layout:
        """Keeps a layout that was read or written. Returns it."""
        self._layouts.put(sha256, layout, layout.memory_nbytes)
        return layout

    def digest_list(self, sha256: str, num_tensors: int) -> DigestArray:
        """Returns a list of digests, read-only."""
        nbytes = DIGEST_NBYTES * num_tensors
        return self.kept_digests(
            sha256, num_tensors, lambda: unpack_list(self._get(keys.digests(sha256), sha256, nbytes), num_tensors)
        )

    def kept_digests(self, key: Hashable, num_tensors: int, make: Callable[[], DigestArray]) -> DigestArray:
        """Returns an array that is kept under this key, or else makes and keeps it."""
        found = self._digests.get((key, num_tensors))
        if found is not None:
            return found  # type: ignore[return-value]
        return self.keep_digests(key, make())

    def keep_digests(self, key: Hashable, digests_T: DigestArray) -> DigestArray:
        """Keeps an array that was read or written, and that nothing changes any more. Returns it."""
        digests_T.setflags(write=False)
        self._digests.put((key, len(digests_T)), digests_T, digests_T.nbytes)
        return digests_T

    def assets(self, ref: ObjectRef) -> tuple[AssetRef, ...]:
        """Returns the assets of a list."""
        return self._parsed(keys.asset(ref.sha256), ref, unpack_assets)

    def provenance(self, ref: ObjectRef) -> dict[str, str]:
        """Returns a provenance."""
        return dict(self._parsed(keys.provenance(ref.sha256), ref, unpack_provenance))

    def keep_assets(self, ref: ObjectRef, raw: bytes) -> None:
        """Keeps a list of assets that was written."""
        self._keep_parsed(keys.asset(ref.sha256), ref, unpack_assets(raw))

    def keep_provenance(self, ref: ObjectRef, raw: bytes) -> None:
        """Keeps a provenance that was written."""
        self._keep_parsed(keys.provenance(ref.sha256), ref, unpack_provenance(raw))

    def _keep_parsed(self, key: str, ref: ObjectRef, value: object) -> None:
        self._small.put(key, value, _PARSED_FACTOR * ref.nbytes)

    def _parsed(self, key: str, ref: ObjectRef, parse: Callable[[bytes], Value]) -> Value:
        found = self._small.get(key)
        if found is not None:
            return found  # type: ignore[return-value]
        value = parse(self._get(key, ref.sha256, ref.nbytes, MAX_LIST_NBYTES))
        self._keep_parsed(key, ref, value)
        return value

    def _get(self, key: str, sha256: str, nbytes: int, max_nbytes: int | None = None) -> bytes:
        """Returns an object's bytes, which are those of the header that names it."""
        if max_nbytes is not None and nbytes > max_nbytes:
            raise CorruptError(f"{key} in {self._store.url} has {nbytes} bytes; at most {max_nbytes} are read", key=key)
        raw = self._store.get(key, nbytes)
        actual = (len(raw), hashlib.sha256(raw).hexdigest())
        if actual != (nbytes, sha256):
            raise DigestMismatchError(
                f"{key} in {self._store.url} has {actual[0]} bytes with sha256 {actual[1]}, its header says {nbytes} "
                f"bytes with {sha256}",
                what=key, expected=(nbytes, sha256), actual=actual,
            )  # fmt: skip
        return raw
