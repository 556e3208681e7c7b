"""One suite for every store of the house."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_SECONDS
from weightline.errors import InputError, NotFoundError, ObjectExistsError, StorageError
from weightline.store import Store, open_store
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore
from weightline.store.open import check_writable
from weightline.store.transfers import watching


def test_what_was_put_is_got(store: Store, tmp_path: Path) -> None:
    store.put_if_absent("commits/1.json", b"one")
    store.put("hints/tip.json", b"a")
    store.put("hints/tip.json", b"b")
    (tmp_path / "file").write_bytes(b"payload")
    store.put_file("payloads/x", tmp_path / "file")
    store.get_file("payloads/x", tmp_path / "copy")
    assert (store.get("commits/1.json"), store.get("hints/tip.json")) == (b"one", b"b")
    assert (tmp_path / "copy").read_bytes() == b"payload"
    info = store.head("payloads/x")
    assert info is not None
    assert (info.key, info.nbytes) == ("payloads/x", 7)


@pytest.mark.parametrize("any_url", ["local", "s3", "az", "gs", "hub"], indirect=True)
def test_every_byte_of_a_file_is_told_to_who_watches(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(random.Random(0).randbytes(3_000_000))
    sent: list[int] = []
    received: list[int] = []
    with watching(sent.append):
        store.put_file("payloads/x", tmp_path / "file")
    with watching(received.append):
        store.get_file("payloads/x", tmp_path / "copy")
    assert (sum(sent), sum(received)) == (3_000_000, 3_000_000)


def test_create_only_keeps_the_first(store: Store) -> None:
    store.put_if_absent("commits/1.json", b"one")
    with pytest.raises(ObjectExistsError) as caught:
        store.put_if_absent("commits/1.json", b"two")
    assert caught.value.facts["key"] == "commits/1.json"
    assert store.get("commits/1.json") == b"one"


def test_missing_objects(store: Store, tmp_path: Path) -> None:
    for read in (lambda: store.get("no"), lambda: store.get_file("no", tmp_path / "x")):
        with pytest.raises(NotFoundError):
            read()
    assert store.head("no") is None
    store.delete("no")


def test_list_is_in_key_order_and_starts_after(store: Store) -> None:
    names = ["a/1", "a/2", "a/b/3", "a-b", "b/1", "a/10"]
    for name in names:
        store.put(name, b"")
    assert [i.key for i in store.list("a/")] == sorted(n for n in names if n.startswith("a/"))
    assert [i.key for i in store.list("")] == sorted(names)
    assert [i.key for i in store.list("a/", "a/10")] == ["a/2", "a/b/3"]
    assert list(store.list("none/")) == []


def test_keys_stay_inside(store: Store) -> None:
    for key in ("../x", "/x", "a//b", "a/../b", "", "a\\b", "a\0b"):
        with pytest.raises(InputError):
            store.put(key, b"")


def test_check_writable_leaves_nothing(store: Store) -> None:
    check_writable(store)
    assert list(store.list("")) == []


def test_a_store_that_ignores_create_only_is_refused() -> None:
    class Overwriting(MemoryStore):
        def put_if_absent(self, key: str, body: bytes) -> None:
            self.put(key, body)

    with pytest.raises(StorageError, match="create-only"):
        check_writable(Overwriting())


def test_a_bucket_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writable"):
        check_writable(open_store(f"file://{tmp_path}/file/bucket"))


def test_urls(tmp_path: Path) -> None:
    local = open_store(f"file://{tmp_path}/b%20c")
    assert isinstance(local, LocalStore)
    assert local.root == tmp_path / "b c"
    assert open_store("memory://one") is open_store("memory://one")
    for url in ("ftp://x/y", "file://host/path", "", " ", "file://"):
        with pytest.raises(InputError):
            open_store(url)


def _race(root: Path, number: int, barrier: object, wins: object) -> None:
    store = LocalStore(root)
    barrier.wait()  # type: ignore[attr-defined]
    for key in range(20):
        try:
            store.put_if_absent(f"commits/{key}", str(number).encode())
            wins.put((key, number))  # type: ignore[attr-defined]
        except ObjectExistsError:
            pass


@pytest.mark.process
def test_one_of_several_processes_wins_each_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, wins = context.Barrier(3), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path, n, barrier, wins)) for n in range(3)]
    for racer in racers:
        racer.start()
    won = [wins.get(timeout=PATIENCE_SECONDS) for _ in range(20)]
    for racer in racers:
        racer.join(60)
    assert sorted(key for key, _ in won) == list(range(20))
    store = LocalStore(tmp_path)
    assert all(store.get(f"commits/{key}") == str(number).encode() for key, number in won)
    assert not list((tmp_path / ".staging").iterdir())
