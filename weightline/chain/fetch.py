"""Objects of a chain to local files, with their size and sha256 checked before anyone reads them."""

from __future__ import annotations

import hashlib
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
    """Download to `path` (through a temporary name beside it) and check it. DigestMismatchError when it is not what the
    manifest says; then nothing stands at `path`. Safe to repeat.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        store.get_file(wanted.key, partial)
        actual_nbytes = partial.stat().st_size
        if actual_nbytes != wanted.nbytes:
            raise DigestMismatchError(
                f"{wanted.key} has {actual_nbytes} bytes, its manifest says {wanted.nbytes}",
                what=wanted.key, expected=wanted.nbytes, actual=actual_nbytes,
            )  # fmt: skip
        actual = sha256_of(partial)
        if actual != wanted.sha256:
            raise DigestMismatchError(
                f"{wanted.key} has sha256 {actual}, its manifest says {wanted.sha256}",
                what=wanted.key, expected=wanted.sha256, actual=actual,
            )  # fmt: skip
        return partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
