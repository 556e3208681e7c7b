"""A bucket in a local folder: `file:///path`. Durable: files and the directories that name them are fsynced.

Readers see an object only when it is complete: the bytes go to a hidden staging file first, are fsynced, and then get
their name by link(2), which fails when the name is taken (create-only), or by rename(2) (replace). obstore's LocalStore
is not used, since it never fsyncs.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from weightline.errors import NotFoundError, ObjectExistsError, StorageError, TransientStorageError
from weightline.store.base import MAX_GET_NBYTES, DecisiveStore, ObjectInfo, checked_key, require_nbytes
from weightline.store.transfers import copy_counted

_STAGING = ".staging"
_TRANSIENT_ERRNOS = frozenset({errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT, errno.EIO, errno.EBUSY})


#: Leaves room for the times that are added to it.
_FAR_FUTURE = datetime(9999, 1, 1, tzinfo=UTC)


class LocalStore(DecisiveStore):
    """Implements `Store` on a folder. Safe for many processes of one host."""

    def __init__(self, root: Path) -> None:
        # Symbolic links and spellings are resolved, so that one folder has one URL: locks and records are keyed by it.
        self.root = Path(os.path.realpath(root))
        self.url = self.root.as_uri()

    @property
    def staging_prefix(self) -> str:
        return f"{_STAGING}/"

    def get(self, key: str, max_nbytes: int = MAX_GET_NBYTES) -> bytes:
        with self._storage_errors(key), self._path(key).open("rb") as file:
            require_nbytes(self.url, key, os.fstat(file.fileno()).st_size, at_most=max_nbytes)
            return file.read()

    def get_file(self, key: str, path: Path, nbytes: int | None = None) -> None:
        with self._storage_errors(key), self._path(key).open("rb") as source:
            require_nbytes(self.url, key, os.fstat(source.fileno()).st_size, exactly=nbytes)
            with path.open("wb") as target:
                copy_counted(source, target)

    def put_if_absent(self, key: str, body: bytes) -> None:
        with self._storage_errors(key), self._staged(lambda file: file.write(body)) as staged:
            self._publish(staged, self._path(key), replace=False)

    def put(self, key: str, body: bytes) -> None:
        with self._storage_errors(key), self._staged(lambda file: file.write(body)) as staged:
            self._publish(staged, self._path(key), replace=True)

    def put_file(self, key: str, path: Path) -> None:
        with (
            self._storage_errors(key),
            path.open("rb") as source,
            self._staged(lambda file: copy_counted(source, file)) as staged,
        ):
            self._publish(staged, self._path(key), replace=True)

    def head(self, key: str) -> ObjectInfo | None:
        with self._storage_errors(key):
            try:
                found = self._path(key).stat()
            except FileNotFoundError:
                return None
            return _info(key, found)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """Folders that are symbolic links are left out: gc would delete what they lead to, outside of the bucket.

        StorageError when the prefix itself leads through one, since an empty listing would say that nothing is there.
        """
        folder = prefix.rpartition("/")[0]
        with self._storage_errors(prefix):
            self._require_plain(self.root / folder)
            yield from self._walk(self.root / folder, prefix, start_after)

    def delete(self, *keys: str) -> None:
        """Each folder is fsynced once, after its last object is gone."""
        folders: dict[Path, str] = {}
        for key in keys:
            path = self._path(key)
            with self._storage_errors(key):
                self._require_plain(path.parent)
                path.unlink(missing_ok=True)
            folders[path.parent] = key
        for folder, key in folders.items():
            with self._storage_errors(key), suppress(FileNotFoundError):
                _fsync_directory(folder)

    def _require_plain(self, folder: Path) -> None:
        """Raises StorageError for a folder that a symbolic link leads to."""
        real = Path(os.path.realpath(folder))
        if real != folder:
            raise StorageError(
                f"{self.url}: {folder} leads through a symbolic link to {real}, which is not followed. Move the files "
                "into the bucket's folder, or mount them there",
                url=self.url,
            )

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    def _walk(self, folder: Path, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name + "/" if _is_folder(e) else e.name)
        except FileNotFoundError:
            return
        folder_key = folder.relative_to(self.root).as_posix()
        start = "" if folder_key == "." else f"{folder_key}/"
        for entry in entries:
            key = f"{start}{entry.name}"
            if entry.name == _STAGING:
                continue
            if _is_folder(entry):
                if start_after[: len(key) + 1] > f"{key}/":
                    continue  # every key in this folder comes before `start_after`
                if prefix.startswith(f"{key}/") or key.startswith(prefix):
                    yield from self._walk(Path(entry.path), prefix, start_after)
            elif key.startswith(prefix) and key > start_after:
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue  # deleted since the folder was read, or a broken link
                except OSError as error:
                    if error.errno == errno.ELOOP:
                        continue
                    raise
                if stat.S_ISREG(found.st_mode):
                    yield _info(key, found)

    @contextmanager
    def _staged(self, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
        """Writes a hidden, fsynced file and removes it when the block ends. A crash leaves the file, unread, for gc."""
        # Not `weightline.files.write_atomically`: a commit must fail where the name is taken, which link(2) does and
        # rename(2) does not, and its name must survive a power cut, so the folder is fsynced, too.
        staging = self.root / _STAGING
        _make_durable_directory(staging)
        staged = staging / uuid.uuid4().hex
        try:
            with staged.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def _publish(self, staged: Path, target: Path, *, replace: bool) -> None:
        _make_durable_directory(target.parent)
        if replace:
            staged.replace(target)
        else:
            try:
                os.link(staged, target)
            except FileExistsError as error:
                key = target.relative_to(self.root).as_posix()
                raise ObjectExistsError(f"{key} exists in {self.url}", key=key, url=self.url) from error
        _fsync_directory(target.parent)

    @contextmanager
    def _storage_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"no object {key} in {self.url}", key=key) from error
        except OSError as error:
            cls = TransientStorageError if error.errno in _TRANSIENT_ERRNOS else StorageError
            raise cls(
                f"{self.url}: {error.strerror} at {key}. Is the folder writable, with room left?", key=key, url=self.url
            ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False)


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    """An object whose time no calendar has counts as new, so that nothing deletes it for its age."""
    try:
        modified_at = datetime.fromtimestamp(found.st_mtime, UTC)
    except (ValueError, OverflowError, OSError):
        modified_at = _FAR_FUTURE
    return ObjectInfo(key, found.st_size, modified_at)


def _make_durable_directory(folder: Path) -> None:
    """Creates the folder and its missing parents. Every new entry survives a power cut."""
    if folder.is_dir():
        return
    _make_durable_directory(folder.parent)
    folder.mkdir(exist_ok=True)
    _fsync_directory(folder.parent)


def _fsync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
