"""Payloads that move while others are encoded or replayed: all arrive, and no failure is lost."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weightline.chain.replay.fetch import fetching
from weightline.chain.write.draft import uploading
from weightline.errors import TransientStorageError
from weightline.format.manifest import StoredObject
from weightline.store import Store
from weightline.store.memory import MemoryStore
from weightline.testing.faults import FaultStore, failing

#: By its URL a remote store: transfers of local ones do not overlap.
_URL = "s3://of-this-test/chain"


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "0")


def _files(folder: Path, number: int) -> dict[str, Path]:
    files = {}
    for one in range(number):
        path = folder / f"payload-{one}"
        path.write_bytes(bytes([one]) * 100)
        files[f"payloads/{one}"] = path
    return files


def _upload_all(store: Store, files: dict[str, Path]) -> None:
    with uploading(store) as uploads:
        for key, path in files.items():
            uploads.start(key, path)


def test_all_uploads_are_done_when_the_block_ends(tmp_path: Path) -> None:
    store = MemoryStore(_URL)
    files = _files(tmp_path, 7)
    _upload_all(store, files)
    assert [info.key for info in store.list("")] == sorted(files)
    assert store.get("payloads/3") == b"\x03" * 100
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_fails_the_block(tmp_path: Path) -> None:
    store = FaultStore(MemoryStore(_URL), failing(verb="put_file", key_prefix="payloads/1", times=1))
    with pytest.raises(TransientStorageError):
        _upload_all(store, _files(tmp_path, 3))


def test_what_was_fetched_ahead_fails_when_it_is_asked_for(tmp_path: Path) -> None:
    inner = MemoryStore(_URL)
    wanted = []
    for key, path in _files(tmp_path, 5).items():
        inner.put_file(key, path)
        body = path.read_bytes()
        wanted.append(StoredObject(key=key, nbytes=len(body), sha256=hashlib.sha256(body).hexdigest()))
    store = FaultStore(inner, failing(verb="get_file", key_prefix="payloads/2", times=1))
    with fetching(store) as fetcher:
        fetcher.prefetch(wanted)
        with pytest.raises(TransientStorageError):
            fetcher.fetch(wanted[2])
        assert [fetcher.fetch(one).read_bytes()[0] for one in wanted] == [0, 1, 2, 3, 4]
