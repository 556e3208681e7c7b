"""The host's cache: one download for many readers, bounded, never torn, and no lock outlives its process."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import threading
import time
from pathlib import Path

import pytest

from tests.chains import commit_state, nudged, random_state
from tests.store.proxy import Proxy
from weightline.chain import Chain
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import DigestMismatchError, InputError, TransientStorageError
from weightline.files import SharedLock
from weightline.format.manifest import StoredObject
from weightline.store import open_store
from weightline.store.cache import ObjectCache, SoundFiles, host_cache
from weightline.store.memory import MemoryStore


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _fetch(cache: ObjectCache, body: bytes, calls: list[bytes] | None = None) -> Path:
    def download(path: Path) -> None:
        if calls is not None:
            calls.append(body)
        path.write_bytes(body)

    cached = cache.fetch(_sha256(body), len(body), download)
    assert cached is not None
    cached.release()
    return cached.path


@pytest.fixture
def cache(tmp_path: Path) -> ObjectCache:
    return ObjectCache(tmp_path / "cache", 1000)


def test_an_object_is_downloaded_once(cache: ObjectCache) -> None:
    calls: list[bytes] = []
    paths = {_fetch(cache, b"payload", calls) for _ in range(3)}
    assert len(calls) == 1
    assert paths.pop().read_bytes() == b"payload"


def test_the_least_recently_used_go_first(cache: ObjectCache) -> None:
    bodies = [bytes([number]) * 300 for number in range(3)]
    paths = [_fetch(cache, body) for body in bodies]
    for age, path in zip((300, 200, 100), paths, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    _fetch(cache, bodies[0])
    _fetch(cache, b"x" * 300)
    assert [path.exists() for path in paths] == [True, False, True]
    assert sum(path.stat().st_size for path in (cache.folder / "objects").iterdir()) <= cache.max_nbytes


def test_an_object_in_use_stays(cache: ObjectCache) -> None:
    body = b"in use" * 100
    held = cache.fetch(_sha256(body), len(body), lambda path: _write(path, body))
    assert held is not None
    os.utime(held.path, (0, 0))
    _fetch(cache, b"y" * 600)
    assert held.path.read_bytes() == body
    os.utime(held.path, (0, 0))  # reading was a use
    held.release()
    cache.evict()
    assert not held.path.exists()
    assert [path.name for path in (cache.folder / "objects").iterdir()] == [_sha256(b"y" * 600)]


def _write(path: Path, body: bytes) -> None:
    path.write_bytes(body)


def test_what_is_larger_than_the_cache_goes_past_it(cache: ObjectCache) -> None:
    body = b"z" * 1001
    assert cache.fetch(_sha256(body), len(body), lambda path: pytest.fail("not asked for")) is None


def test_a_file_of_the_wrong_size_is_fetched_again(cache: ObjectCache) -> None:
    path = _fetch(cache, b"payload")
    path.write_bytes(b"pay")
    assert _fetch(cache, b"payload").read_bytes() == b"payload"


def test_a_file_that_was_changed_since_is_fetched_again(cache: ObjectCache, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[bytes] = []
    path = _fetch(cache, b"payload", calls)
    path.write_bytes(b"paYload")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))  # clocks of file systems tick seldom
    assert _fetch(cache, b"payload", calls).read_bytes() == b"payload"
    assert len(calls) == 2
    assert "have changed" in caplog.text


def test_a_process_hashes_an_object_once(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    _fetch(cache, b"payload")
    another_process = ObjectCache(cache.folder, cache.max_nbytes, SoundFiles())
    hashed: list[int] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(1), digest(file, name))[1])
    for _ in range(3):
        _fetch(another_process, b"payload")
        _fetch(cache, b"payload")
    assert len(hashed) == 1


def test_what_a_process_remembers_of_its_files_is_bounded(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ObjectCache(cache.folder, cache.max_nbytes, SoundFiles(max_files=1))
    paths = [_fetch(small, body) for body in (b"one", b"two")]
    hashed: list[int] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: (hashed.append(1), digest(file, name))[1])
    for body, num_hashed in ((b"two", 0), (b"one", 1)):
        _fetch(small, body)
        assert len(hashed) == num_hashed
    assert all(path.exists() for path in paths)


def test_a_file_with_other_bytes_of_the_same_age_as_before_is_found_by_another_process(cache: ObjectCache) -> None:
    path = _fetch(cache, b"payload")
    modified_ns = path.stat().st_mtime_ns
    path.write_bytes(b"paYload")
    os.utime(path, ns=(modified_ns, modified_ns))
    fresh = ObjectCache(cache.folder, cache.max_nbytes, SoundFiles())
    assert _fetch(fresh, b"payload").read_bytes() == b"payload"


def test_old_partial_files_go_whatever_their_names(cache: ObjectCache) -> None:
    """Also those that a store hides beside the file it was asked for."""
    partial = cache.folder / "partial"
    partial.mkdir(parents=True)
    names = [_sha256(b"a"), f"{_sha256(b'a')}.resume", f".{_sha256(b'b')}.1f2e.partial", _sha256(b"c")]
    for name in names:
        (partial / name).write_bytes(b"pa")
        if name != names[-1]:
            os.utime(partial / name, (0, 0))
    calls: list[bytes] = []
    for _ in range(2):
        _fetch(cache, b"payload", calls)
    assert len(calls) == 1
    assert [path.name for path in partial.iterdir()] == [names[-1]]


def test_a_cache_that_cannot_be_tidied_still_serves(
    cache: ObjectCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise PermissionError("as planned")

    monkeypatch.setattr(cache, "evict", fail)
    assert _fetch(cache, b"payload").read_bytes() == b"payload"
    assert "as planned" in caplog.text


def test_an_object_is_on_disk_before_it_has_its_name(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda old, new: (done.append("name"), replace(old, new))[1])
    _fetch(cache, b"payload")
    assert done == ["fsync", "name"]


def test_no_lock_is_held_after_an_error(cache: ObjectCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, "evict", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _fetch(cache, b"payload")
    lock = SharedLock(cache.folder / "locks" / _sha256(b"payload"))
    assert lock.take(exclusive=True)
    lock.release()


def test_a_failed_download_leaves_no_object_and_no_lock(cache: ObjectCache) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"pay")
        raise TransientStorageError("away")

    with pytest.raises(TransientStorageError):
        cache.fetch(_sha256(b"payload"), 7, fail)
    assert list((cache.folder / "objects").iterdir()) == []
    assert _fetch(cache, b"payload").read_bytes() == b"payload"


def test_threads_that_want_the_same_object_share_one_download(cache: ObjectCache) -> None:
    calls: list[bytes] = []
    body = b"shared"

    def download(path: Path) -> None:
        calls.append(body)
        time.sleep(0.1)
        path.write_bytes(body)

    def want() -> None:
        found = cache.fetch(_sha256(body), len(body), download)
        assert found is not None
        assert found.path.read_bytes() == body
        found.release()

    threads = [threading.Thread(target=want) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def _want_many(folder: Path, seed: int, downloads: object) -> None:
    cache = ObjectCache(folder, 2500)
    for number in range(40):
        body = bytes([(number * 7 + seed) % 10]) * 500

        def download(path: Path, body: bytes = body) -> None:
            downloads.put(1)  # type: ignore[attr-defined]
            path.write_bytes(body)

        found = cache.fetch(_sha256(body), len(body), download)
        assert found is not None
        assert found.path.read_bytes() == body
        found.release()


@pytest.mark.process
def test_processes_share_a_cache_that_is_too_small_for_them(tmp_path: Path) -> None:
    """Ten objects, room for five, three processes: every read is whole, and the bound holds at the end."""
    context = multiprocessing.get_context("spawn")
    downloads = context.Queue()
    children = [context.Process(target=_want_many, args=(tmp_path, seed, downloads)) for seed in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    ObjectCache(tmp_path, 2500).evict()
    assert sum(path.stat().st_size for path in (tmp_path / "objects").iterdir()) <= 2500


def _die_downloading(folder: Path, sha256: str) -> None:
    def download(path: Path) -> None:
        path.write_bytes(b"pay")
        os._exit(9)

    ObjectCache(folder, 1000).fetch(sha256, 7, download)


@pytest.mark.process
def test_a_process_that_dies_downloading_blocks_nobody(cache: ObjectCache) -> None:
    child = multiprocessing.get_context("spawn").Process(
        target=_die_downloading, args=(cache.folder, _sha256(b"payload"))
    )
    child.start()
    child.join(60)
    assert child.exitcode == 9
    assert _fetch(cache, b"payload").read_bytes() == b"payload"


def test_remote_chains_are_read_through_the_cache(
    s3_url: str, s3_proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE", str(tmp_path / "cache"))
    chain = Chain(open_store(s3_url))
    states = [random_state(0)]
    commit_state(chain, states[0])
    for version in (1, 2):
        states.append(nudged(states[-1], version))
        commit_state(chain, states[-1], states[-2])
    s3_proxy.reset()
    for _ in range(2):
        state = read_state(Chain(open_store(s3_url)), 2)
        assert all((state.bits[name] == bits.reshape(-1)).all() for name, bits in states[2].items())
    gets = [path for method, path in s3_proxy.requests if method == "GET" and "/payloads/" in path]
    assert len(gets) == len(set(gets)) == 6
    payload = chain.manifest(1).payloads[0]
    (tmp_path / "cache" / "objects" / payload.sha256).unlink()
    s3_proxy.flip = re.compile("/payloads/")
    with pytest.raises(DigestMismatchError), fetching(chain.store) as fetcher:
        fetcher.fetch(payload)
    assert not (tmp_path / "cache" / "objects" / payload.sha256).exists()


def test_verify_looks_at_the_bucket_whatever_the_cache_holds(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE", str(tmp_path / "cache"))
    chain = Chain(open_store(s3_url))
    commit_state(chain, random_state(0))
    read_state(Chain(open_store(s3_url)), 0)
    assert verify_chain(Chain(open_store(s3_url))).holds
    payload = chain.manifest(0).payloads[0]
    body = bytearray(chain.store.get(payload.key))
    body[-3] ^= 4
    chain.store.put(payload.key, bytes(body))
    assert not verify_chain(Chain(open_store(s3_url))).holds


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("WEIGHTLINE_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "1000000")
    chain = Chain(open_store(s3_url))
    commit_state(chain, random_state(0))
    assert read_state(Chain(open_store(s3_url)), 0).version == 0
    assert "the cache" in caplog.text


def test_the_environment_sets_folder_and_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLINE_CACHE", str(tmp_path / "a" / "b"))
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "123")
    cache = host_cache()
    assert cache is not None
    assert (cache.folder, cache.max_nbytes) == (tmp_path / "a" / "b", 123)
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "0")
    assert host_cache() is None
    monkeypatch.setenv("WEIGHTLINE_CACHE_NBYTES", "much")
    with pytest.raises(InputError, match="much"):
        host_cache()
    monkeypatch.delenv("WEIGHTLINE_CACHE_NBYTES")
    default = host_cache()
    assert default is not None
    assert 0 < default.max_nbytes <= 32 * 1024**3


def test_many_objects_of_one_operation_take_few_descriptors(tmp_path: Path) -> None:
    """A replay of a thousand versions fetches a thousand payloads, all of which stay readable."""
    store, cache = MemoryStore("memory://many"), ObjectCache(tmp_path / "cache", 100_000)
    wanted = []
    for number in range(200):
        body = b"%d" % number
        store.put(f"o{number}", body)
        wanted.append(StoredObject(key=f"o{number}", nbytes=len(body), sha256=_sha256(body)))
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with fetching(store, cache) as fetcher:
        paths = [fetcher.fetch(one) for one in wanted]
        assert sum(1 for _ in Path("/proc/self/fd").iterdir()) - before < 100
        ObjectCache(tmp_path / "cache", 0).evict()
        assert [path.read_bytes() for path in paths] == [b"%d" % number for number in range(200)]
