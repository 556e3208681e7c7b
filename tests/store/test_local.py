"""The store in a folder: what a power cut, a full disk and a deletion beside it must not do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from weightline.errors import StorageError
from weightline.store.base import Store
from weightline.store.local import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "bucket")


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were fsynced, in order, with what was done to names in between."""
    done: list[str] = []
    fsync, link, replace = os.fsync, os.link, Path.replace

    def path_of(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(path_of(fd)), fsync(fd))[1])
    monkeypatch.setattr(os, "link", lambda old, new: (done.append(f"named {new}"), link(old, new))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append(f"named {new}"), replace(old, new))[1])
    return done


def _put_if_absent(store: Store, key: str, tmp_path: Path) -> None:
    store.put_if_absent(key, b"payload")


def _put(store: Store, key: str, tmp_path: Path) -> None:
    store.put(key, b"payload")


def _put_file(store: Store, key: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"payload")
    store.put_file(key, tmp_path / "file")


Put = Callable[[Store, str, Path], None]
PUTS: list[Put] = [_put_if_absent, _put, _put_file]


@pytest.mark.parametrize("put", PUTS)
def test_file_and_folders_are_on_disk_before_and_after_the_name(
    store: LocalStore, synced: list[str], tmp_path: Path, put: Put
) -> None:
    """The bytes before they get a name; then the folder that has the name, and every new folder's parent."""
    put(store, "payloads/run/x", tmp_path)
    root = store.root
    at = synced.index(f"named {root / 'payloads/run/x'}")
    assert [Path(path).parent for path in synced[:at]].count(root / ".staging") == 1
    assert {str(root.parent), str(root), str(root / "payloads")} <= set(synced[:at])
    assert synced[at + 1 :] == [str(root / "payloads/run")]


def test_a_deletion_is_on_disk(store: LocalStore, synced: list[str]) -> None:
    store.put("payloads/x", b"")
    synced.clear()
    store.delete("payloads/x")
    assert synced == [str(store.root / "payloads")]


@pytest.mark.parametrize("put", PUTS)
@pytest.mark.parametrize("failing", ["fsync", "publish"])
def test_a_failed_write_leaves_nothing(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, put: Put, failing: str
) -> None:
    """As when the disk is full."""
    store.put("payloads/y", b"")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (LocalStore, "_publish")), fail)
    with pytest.raises(StorageError, match="room left"):
        put(store, "payloads/x", tmp_path)
    monkeypatch.undo()
    assert list((store.root / ".staging").iterdir()) == []
    assert [info.key for info in store.list("")] == ["payloads/y"]


def test_what_is_deleted_while_a_listing_runs_is_left_out(store: LocalStore) -> None:
    for number in range(4):
        store.put(f"payloads/{number}", b"")
    infos = store.list("payloads/")
    assert next(infos).key == "payloads/0"
    store.delete("payloads/2")
    assert [info.key for info in infos] == ["payloads/1", "payloads/3"]
