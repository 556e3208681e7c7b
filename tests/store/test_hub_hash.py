"""Hashing what is still on its way: the same hash as of the finished file, and no waiting for what never comes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hf_xet
import pytest

from tests.hub_emulator import HubEmulator, Truncate
from tests.hub_emulator.wire import Request
from tests.waiting import PATIENCE_SECONDS
from weightline.errors import CorruptError, DigestMismatchError, StorageError, TransientStorageError
from weightline.store import transfers
from weightline.store.hub import content as hub_content
from weightline.store.hub import hashing as hub_hash
from weightline.store.hub.hashing import hash_arriving, hash_beside, xet_hash
from weightline.store.hub.store import open_hub, parse_hub_url
from weightline.store.transfers import watching

NBYTES = 5_000_000
_THREADS = ("weightline-hash", "weightline-feed")


@pytest.fixture
def body() -> bytes:
    return os.urandom(NBYTES)  # new to the Hub, which other tests share and damage


@pytest.fixture
def expected(body: bytes, tmp_path: Path) -> str:
    path = tmp_path / "expected"
    path.write_bytes(body)
    return str(hf_xet.hash_files([str(path)])[0].hash)


@pytest.fixture(autouse=True)
def no_leak() -> Iterator[None]:
    """Every test ends with the descriptors and threads of this room that it began with."""

    def held() -> tuple[int, int]:
        pipes = [path for path in Path("/proc/self/fd").iterdir() if _target(path).startswith("pipe:")]
        return len(pipes), sum(thread.name in _THREADS for thread in threading.enumerate())

    before = held()
    yield
    assert held() == before


def _target(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return ""


@pytest.mark.parametrize("piece_nbytes", [NBYTES, 700_001, 65_536])
def test_a_file_that_grows_has_the_hash_of_the_whole(
    body: bytes, expected: str, tmp_path: Path, piece_nbytes: int
) -> None:
    path = tmp_path / "arriving"

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, NBYTES, piece_nbytes):
                file.write(body[start : start + piece_nbytes])
                time.sleep(0.001)

    assert hash_arriving(path, NBYTES, write) == expected
    assert path.read_bytes() == body


def test_what_arrives_is_read_while_it_arrives(
    body: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file disappears at the end of the writing: nothing but the pipe saw its bytes."""
    path, sent = tmp_path / "arriving", 0
    sendfile = os.sendfile

    def counting(out: int, source: int, offset: int, count: int) -> int:
        nonlocal sent
        nbytes = sendfile(out, source, offset, count)
        sent += nbytes
        return nbytes

    def write() -> None:
        path.write_bytes(body)
        while sent < NBYTES:
            time.sleep(0.001)
        path.unlink()

    monkeypatch.setattr(os, "sendfile", counting)
    assert hash_arriving(path, NBYTES, write) == expected


def test_bytes_out_of_order_give_another_hash_and_no_error(body: bytes, expected: str, tmp_path: Path) -> None:
    """A client that writes the second half first, long before the first."""
    path, half = tmp_path / "arriving", NBYTES // 2

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            file.seek(half)
            file.write(body[half:])
            time.sleep(0.1)
            file.seek(0)
            file.write(body[:half])

    assert hash_arriving(path, NBYTES, write) != expected
    assert xet_hash(path) == expected


@pytest.mark.parametrize("nbytes_before", [0, 100, 3_000_000])
def test_a_write_that_fails_ends_at_once(body: bytes, tmp_path: Path, nbytes_before: int) -> None:
    path = tmp_path / "arriving"

    def write() -> None:
        path.write_bytes(body[:nbytes_before])
        raise TransientStorageError("cut")

    start = time.monotonic()
    with pytest.raises(TransientStorageError, match="cut"):
        hash_arriving(path, NBYTES, write)
    assert time.monotonic() - start < hub_hash.END_SECONDS / 2


def test_a_file_system_without_sendfile_costs_a_second_look(
    body: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", refuse)
    path = tmp_path / "arriving"
    assert hash_arriving(path, NBYTES, lambda: path.write_bytes(body) and None) != expected
    assert xet_hash(path) == expected


def test_a_process_that_holds_the_pipe_is_not_waited_for(
    body: bytes, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a child does that is forked during a download: the end of the pipe does not show."""
    path, held = tmp_path / "arriving", []
    pipe = os.pipe

    def holding() -> tuple[int, int]:
        reader, writer = pipe()
        held.append(os.dup(writer))
        return reader, writer

    monkeypatch.setattr(os, "pipe", holding)
    assert hash_arriving(path, NBYTES, lambda: path.write_bytes(body) and None, end_seconds=0.3) == expected
    os.close(held[0])
    for thread in threading.enumerate():
        if thread.name == "weightline-hash":
            thread.join(10)


@pytest.mark.parametrize("nbytes", [1000, NBYTES])
def test_a_file_is_hashed_beside_other_work(body: bytes, tmp_path: Path, nbytes: int) -> None:
    path, done = tmp_path / "file", []
    path.write_bytes(body[:nbytes])
    assert hash_beside(path, lambda: done.append(1)) == xet_hash(path)
    assert done == [1]


def test_a_large_file_is_checked_on_both_ways(
    hub: HubEmulator, hub_url: str, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up and down while it is hashed beside; then a flipped bit, and a transfer that is cut short."""
    source, out, store = tmp_path / "source", tmp_path / "down" / "out", open_hub(hub_url)
    out.parent.mkdir()
    source.write_bytes(body)
    store.put_file("payloads/x", source)
    store.get_file("payloads/x", out)
    assert out.read_bytes() == body
    hub.fault_plan = lambda number, method, path: Truncate() if path.startswith("/xorb/") else None
    with pytest.raises((TransientStorageError, CorruptError)):
        store.get_file("payloads/x", out)
    hub.fault_plan = None
    url = parse_hub_url(hub_url)
    hub.flip_bit(url.bucket_id, f"{url.root}payloads/x")
    with pytest.raises(DigestMismatchError):
        store.get_file("payloads/x", out)
    assert list(out.parent.iterdir()) == []


def test_a_download_grows_at_the_callers_own_partial_name(
    hub: HubEmulator, hub_url: str, body: bytes, tmp_path: Path
) -> None:
    """Whoever cleans up after a killed process finds it there; what that one left is no part of the next."""
    source, out, store = tmp_path / "source", tmp_path / "down" / "out", open_hub(hub_url)
    out.parent.mkdir()
    source.write_bytes(body)
    store.put_file("payloads/x", source)
    out.write_bytes(b"\0" * (len(body) + 1))
    transfers.note_done(out, "another store's", 7)
    seen: list[str] = []

    def look(number: int, method: str, path: str) -> None:
        seen.extend([file.name for file in out.parent.iterdir()] if path.startswith("/xorb/") else [])

    hub.fault_plan = look
    store.get_file("payloads/x", out)
    assert set(seen) == {"out"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.read_bytes() == body


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """A shell's background job, as a CI's may be, has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_a_download_at_once(
    hub: HubEmulator, hub_url: str, body: bytes, tmp_path: Path, heeds_interrupts: None
) -> None:
    source, out, store = tmp_path / "source", tmp_path / "down" / "out", open_hub(hub_url)
    out.parent.mkdir()
    source.write_bytes(body)
    store.put_file("payloads/x", source)
    is_asked, goes_on = threading.Event(), threading.Event()

    def stall(number: int, method: str, path: str) -> None:
        if path.startswith("/xorb/"):
            is_asked.set()
            goes_on.wait(20)

    def interrupt() -> None:
        is_asked.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    hub.fault_plan = stall
    presser = threading.Thread(target=interrupt)
    presser.start()
    with pytest.raises(KeyboardInterrupt):
        store.get_file("payloads/x", out)
    assert not goes_on.is_set()
    goes_on.set()
    presser.join()
    assert list(out.parent.iterdir()) == []
    store.get_file("payloads/x", out)
    assert out.read_bytes() == body


def test_downloads_share_one_client_while_its_token_holds(
    hub: HubEmulator, hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, session, opened = open_hub(hub_url), hub_content._session(os.getpid()), []

    class Counting:
        new_upload_commit = session.new_upload_commit

        def new_file_download_group(self, **connection: object) -> object:
            opened.append(connection["token"])
            return session.new_file_download_group(**connection)

    monkeypatch.setattr(hub_content, "_session", lambda pid: Counting())
    store.put("x", b"1")
    assert [store.get("x") for _ in range(3)] == [b"1"] * 3
    content = store._bucket._content
    assert len(opened) == 1
    assert content._group is not None
    content._group = ((os.getpid(), "the token before"), content._group[1])
    assert store.get("x") == b"1"
    assert len(opened) == 2


def test_a_download_out_of_order_is_hashed_again_and_accepted(
    hub: HubEmulator, hub_url: str, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, store = tmp_path / "source", tmp_path / "out", open_hub(hub_url)
    source.write_bytes(body)
    store.put_file("payloads/x", source)
    monkeypatch.setattr(hub_content, "hash_arriving", lambda path, nbytes, write: write() or "f" * 64)
    store.get_file("payloads/x", out)
    assert out.read_bytes() == body


def test_an_upload_of_another_file_than_was_hashed_is_an_error(
    hub: HubEmulator, hub_url: str, body: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the file changes on its way."""
    source = tmp_path / "source"
    source.write_bytes(body)
    monkeypatch.setattr(hub_content, "hash_beside", lambda path, work: work() or "f" * 64)
    with pytest.raises(TransientStorageError, match="was written"):
        open_hub(hub_url, write_visible_pauses_seconds=(0.0, 0.01)).put_file("payloads/x", source)


def test_a_missing_file_is_a_storage_error(hub: HubEmulator, hub_url: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        open_hub(hub_url).put_file("payloads/x", tmp_path / "none")


@pytest.mark.parametrize("chosen", ["", "32000000"])
def test_the_clients_blocks_are_small_unless_the_user_says_otherwise(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "HF_XET_RECONSTRUCTION_MIN_RECONSTRUCTION_FETCH_SIZE"
    monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv(name, chosen)
    config = hub_content.client_config()
    found = [config.get(f"reconstruction.{end}_reconstruction_fetch_size") for end in ("min", "max")]
    assert found[0] == (32_000_000 if chosen else 16_000_000)
    assert found[1] == (
        hf_xet.XetConfig().get("reconstruction.max_reconstruction_fetch_size") if chosen else 16_000_000
    )
    assert config.get("client.retry_max_attempts") == 3


@pytest.mark.nightly
def test_the_memory_of_a_download_does_not_grow_with_the_file(hub: HubEmulator, hub_url: str, tmp_path: Path) -> None:
    """At its peak, in a process of its own; the client by its own choice holds most of such a file."""
    source = tmp_path / "source"
    with source.open("wb") as file:
        for _ in range(600):
            file.write(os.urandom(2**20))
    open_hub(hub_url).put_file("payloads/x", source)
    command = [sys.executable, "-c", _DOWNLOAD, hub_url, str(tmp_path / "out")]
    peak_nbytes = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert (tmp_path / "out").stat().st_size == source.stat().st_size
    assert peak_nbytes < 320 * 2**20


_DOWNLOAD = """
import re, sys, threading, time
from pathlib import Path
from weightline.store.hub.store import open_hub

peak = 0
def watch():
    global peak
    while True:
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024)
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
open_hub(sys.argv[1]).get_file("payloads/x", Path(sys.argv[2]))
print(peak)
"""


def test_whoever_watches_sees_a_download_move(hub: HubEmulator, hub_url: str, tmp_path: Path) -> None:
    source, store, pieces = tmp_path / "source", open_hub(hub_url), []
    source.write_bytes(os.urandom(64_000_000))  # four blocks
    store.put_file("payloads/x", source)
    held: list[int] = []
    has_moved = threading.Event()

    def watch(nbytes: int) -> None:
        pieces.append(nbytes)
        if nbytes > 0:
            has_moved.set()

    def hold_second_half(request: Request) -> None:
        """Answers for the second half of the file only when the watcher has heard of the first."""
        wanted = request.byte_range(64_000_000) if request.path.startswith("/xorb/") else None
        if wanted is not None and wanted[0] > 32_000_000:
            held.append(wanted[0])
            has_moved.wait(PATIENCE_SECONDS)

    hub.hold = hold_second_half
    with watching(watch):
        store.get_file("payloads/x", tmp_path / "out")
    assert held
    assert sum(pieces) == 64_000_000
    assert sum(nbytes > 0 for nbytes in pieces) > 1
