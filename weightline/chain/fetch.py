"""Objects of a chain to local files, with their size and sha256 checked before anyone reads them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightline.errors import DigestMismatchError
from weightline.format.manifest import StoredObject
from weightline.store import Store


def sha256_of(path: Path) -> str:
    """The file's sha256, hex, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()


def fetch_object(store: Store, wanted: StoredObject, path: Path) -> Path:
    """Download to `path` (through a temporary name beside it) and check it. Safe to repeat.

    DigestMismatchError when it is not what the manifest says; then nothing stands at `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        store.get_file(wanted.key, partial)
        actual: tuple[int, str] = (partial.stat().st_size, sha256_of(partial))
        expected = (wanted.nbytes, wanted.sha256)
        if actual != expected:
            raise DigestMismatchError(
                f"{wanted.key} has {actual[0]} bytes with sha256 {actual[1]}, its manifest says {expected[0]} bytes "
                f"with {expected[1]}",
                what=wanted.key,
                expected=expected,
                actual=actual,
            )
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Fetcher:
    """Fetches each object of a chain once and keeps it, checked, in a folder of its own."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder

    def fetch(self, wanted: StoredObject) -> Path:
        """The object's local file."""
        path = self._folder / wanted.sha256
        return path if path.exists() else fetch_object(self._store, wanted, path)


@contextmanager
def fetching(store: Store) -> Iterator[Fetcher]:
    """A fetcher for the length of one operation; its folder goes with it."""
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        yield Fetcher(store, Path(folder))
