"""The object store client against an S3 server and a bad network: what it says, repeats, resumes and refuses."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import re
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.hub_emulator.faults import Cut, LoseReply, Status, Truncate
from tests.store.proxy import Proxy, Slow, Stall
from tests.store.racers import write_checkpoint_folder
from tests.store.servers import open_patiently
from tests.waiting import PATIENCE_SECONDS
from weightline.chain.read.history import Chain
from weightline.chain.write.standalone import commit_folder
from weightline.errors import (
    InputError,
    NotFoundError,
    ObjectExistsError,
    StorageError,
    TransientStorageError,
)
from weightline.store import open_store
from weightline.store.objects import store as objects
from weightline.store.objects.clients import open_s3
from weightline.store.objects.store import ObjectStore, Patience
from weightline.store.open import check_writable
from weightline.store.retry import RetryingStore
from weightline.store.transfers import note_of

#: The smallest part that S3 takes.
_PART_NBYTES = 5 * 1024 * 1024
_LARGE_NBYTES = 3 * _PART_NBYTES + 17


def _bare(url: str) -> ObjectStore:
    """The client without our repeating around it."""
    store = open_store(url)
    assert isinstance(store, RetryingStore)
    assert isinstance(store.inner, ObjectStore)
    return store.inner


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART_NBYTES", _PART_NBYTES)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "payload"
    path.write_bytes(random.Random(0).randbytes(_LARGE_NBYTES))
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_large_files_go_in_parts_and_come_in_ranges(s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path) -> None:
    store = open_store(s3_url)
    store.put_file("payloads/x", large)
    store.get_file("payloads/x", tmp_path / "copy")
    assert _sha256(tmp_path / "copy") == _sha256(large)
    parts = [path for method, path in s3_proxy.requests if method == "PUT" and "partNumber=" in path]
    ranges = [path for method, path in s3_proxy.requests if method == "GET"]
    assert len(parts) == len(ranges) == 4
    assert not note_of(tmp_path / "copy").exists()


@pytest.mark.parametrize("num_parallel", [1, 3])
def test_parts_and_ranges_move_several_at_a_time(
    s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_parallel: int
) -> None:
    monkeypatch.setattr(objects, "_NUM_PARALLEL", num_parallel)
    store = open_store(s3_url)
    s3_proxy.plan = lambda number, method, path: Slow(0.5)
    store.put_file("payloads/x", large)
    store.get_file("payloads/x", tmp_path / "copy")
    assert (s3_proxy.most_open["PUT"], s3_proxy.most_open["GET"]) == (num_parallel, num_parallel)


_MEASURED = """
import re, sys
from pathlib import Path
from weightline.store import open_store
from weightline.store.objects import store as objects

def peak_nbytes():
    return int(re.search("VmHWM: *\\t* *([0-9]+) kB", Path("/proc/self/status").read_text())[1]) * 1024

store, source = open_store(sys.argv[1]), Path(sys.argv[2])
small = source.with_name("small")
small.write_bytes(b"x")
store.put_file("warm", small)
store.get_file("warm", small)
before = peak_nbytes()
store.get_file("payloads/x", source.with_name("copy"))
received = peak_nbytes()
objects.PART_NBYTES = 5 * 2**20
store.put_file("payloads/y", source)
print(received - before, peak_nbytes() - received)
"""


def test_large_files_are_never_in_memory(s3_url: str, tmp_path: Path) -> None:
    """Pieces of six ranges on the way down, six parts of 5 MiB on the way up, of 160 MiB."""
    with (tmp_path / "payload").open("wb") as file:
        for _ in range(160):
            file.write(os.urandom(2**20))
    open_store(s3_url).put_file("payloads/x", tmp_path / "payload")
    argv = [sys.executable, "-c", _MEASURED, s3_url, str(tmp_path / "payload")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300)
    down_nbytes, up_nbytes = map(int, done.stdout.split())
    assert down_nbytes < 50 * 2**20
    assert up_nbytes < 80 * 2**20


def test_an_empty_file(s3_url: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    store = open_store(s3_url)
    store.put_file("payloads/empty", tmp_path / "empty")
    store.get_file("payloads/empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_a_cut_download_goes_on_where_it_stopped(
    s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_NUM_PARALLEL", 1)  # ranges come in order: the last is the one that is cut
    store = _bare(s3_url)
    store.put_file("payloads/x", large)
    copy = tmp_path / "copy"
    s3_proxy.reset()
    s3_proxy.plan = lambda number, method, path: Cut() if method == "GET" and _is_late(s3_proxy) else None
    with pytest.raises(TransientStorageError):
        store.get_file("payloads/x", copy)
    done = int(note_of(copy).read_text().splitlines()[1])
    assert done == 3 * _PART_NBYTES
    s3_proxy.reset()
    store.get_file("payloads/x", copy)
    assert _sha256(copy) == _sha256(large)
    assert len([1 for method, _ in s3_proxy.requests if method == "GET"]) == -(-(_LARGE_NBYTES - done) // _PART_NBYTES)


def _is_late(proxy: Proxy) -> bool:
    """All GETs after the third of a download: the client's own few repeats included."""
    return len([1 for method, _ in proxy.requests if method == "GET"]) > 3


def test_slow_links_are_waited_for(s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path) -> None:
    """What moves slowly is not taken for what stalls: parts up may take long, and so may ranges that trickle."""
    store = open_patiently(s3_url, Patience(read_seconds=1))
    s3_proxy.plan = lambda number, method, path: Slow(1.5)
    store.put_file("payloads/x", large)
    store.get_file("payloads/x", tmp_path / "copy")
    assert _sha256(tmp_path / "copy") == _sha256(large)
    methods = [method for method, _ in s3_proxy.requests]
    assert (methods.count("PUT"), methods.count("GET")) == (4, 4)


def test_objects_are_deleted_by_one_request(s3_url: str, s3_proxy: Proxy) -> None:
    """One by one where the service refuses that, and a single object always by itself: every service can do it."""
    store, keys = _bare(s3_url), [f"payloads/{number}" for number in range(3)]
    for plan, wanted in (
        (None, ["POST"]),
        (lambda n, method, path: Status(405) if n == 0 else None, ["POST"] + 3 * ["DELETE"]),
    ):
        for key in keys:
            store.put(key, b"x")
        s3_proxy.reset()
        s3_proxy.plan = plan
        store.delete(*keys)
        assert [method for method, _ in s3_proxy.requests] == wanted
        s3_proxy.plan = None
        assert list(store.list("")) == []
    s3_proxy.reset()
    store.delete(keys[0])
    assert [method for method, _ in s3_proxy.requests] == ["DELETE"]


def test_parts_under_way_fit_the_time_of_a_request_on_a_link_of_3_mbit_a_second() -> None:
    nbytes = objects._NUM_PARALLEL * 16 * 1024 * 1024
    timeout = objects._SENDING["timeout"]
    assert isinstance(timeout, timedelta)
    assert 8 * nbytes / timeout.total_seconds() <= 3e6


def test_a_download_that_stalls_goes_on_soon(s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path) -> None:
    store = RetryingStore(open_patiently(s3_url, Patience(read_seconds=0.5)))
    store.put_file("payloads/x", large)
    is_first = iter([True])
    s3_proxy.plan = lambda number, method, path: Stall(120) if method == "GET" and next(is_first, False) else None
    begun = time.monotonic()
    store.get_file("payloads/x", tmp_path / "copy")
    assert time.monotonic() - begun < 60
    assert _sha256(tmp_path / "copy") == _sha256(large)


def test_another_object_is_not_continued(s3_url: str, large: Path, tmp_path: Path) -> None:
    store = _bare(s3_url)
    store.put_file("payloads/x", large)
    copy = tmp_path / "copy"
    copy.write_bytes(b"of something else")
    note_of(copy).write_text("something else")
    store.get_file("payloads/x", copy)
    assert _sha256(copy) == _sha256(large)


def test_a_truncated_reply_is_never_taken_for_the_object(
    s3_url: str, s3_proxy: Proxy, large: Path, tmp_path: Path
) -> None:
    store = _bare(s3_url)
    store.put_file("payloads/x", large)
    store.put("small", b"0123456789")
    s3_proxy.plan = lambda number, method, path: Truncate() if method == "GET" else None
    with pytest.raises(TransientStorageError):
        store.get("small")
    with pytest.raises(TransientStorageError):
        store.get_file("payloads/x", tmp_path / "copy")


@pytest.mark.parametrize("fault", [Cut(), LoseReply(), Status(429), Status(500), Status(503)], ids=str)
def test_passing_failures_are_waited_out(s3_url: str, s3_proxy: Proxy, tmp_path: Path, fault: object) -> None:
    """Each kind of request fails five times: more often than the client itself would ask again."""
    store = RetryingStore(_bare(s3_url), pause_seconds=0.01)
    check_writable(store)
    failed: dict[str, int] = {}

    def plan(number: int, method: str, path: str) -> object:
        failed[method] = failed.get(method, 0) + 1
        return fault if failed[method] <= 5 else None

    s3_proxy.plan = plan  # type: ignore[assignment]
    store.put_if_absent("commits/1", b"one")
    (tmp_path / "file").write_bytes(b"payload")
    store.put_file("payloads/x", tmp_path / "file")
    store.get_file("payloads/x", tmp_path / "copy")
    assert [info.key for info in store.list("")] == ["commits/1", "payloads/x"]
    assert store.get("commits/1") == b"one"
    store.delete("commits/1")
    assert min(failed.values()) > 5


def test_a_lost_reply_is_no_conflict_and_a_conflict_stays_one(s3_url: str, s3_proxy: Proxy) -> None:
    store = open_store(s3_url)
    check_writable(store)
    is_first = iter([True])
    s3_proxy.plan = lambda number, method, path: LoseReply() if method == "PUT" and next(is_first, False) else None
    store.put_if_absent("commits/1", b"mine")
    is_first = iter([True])
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("commits/1", b"another")
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"


def test_create_only_puts_that_met_are_asked_for_again(s3_url: str, s3_proxy: Proxy) -> None:
    """S3 says 409 ConditionalRequestConflict when none of them won, which its client takes for "exists"."""
    store = RetryingStore(_bare(s3_url), pause_seconds=0.01)
    check_writable(store)
    is_first = iter([True])
    s3_proxy.plan = lambda number, method, path: Status(409) if method == "PUT" and next(is_first, False) else None
    store.put_if_absent("commits/1", b"mine")
    is_first = iter([True])
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("commits/1", b"mine")
    assert store.get("commits/1") == b"mine"


def test_a_request_that_the_service_gave_up_on_is_asked_for_again(s3_url: str, s3_proxy: Proxy, large: Path) -> None:
    """S3 says 400 RequestTimeout when a body came too slowly."""
    store = RetryingStore(_bare(s3_url), pause_seconds=0.01)
    is_first = iter([True])
    s3_proxy.plan = lambda number, method, path: (
        Status(400, "RequestTimeout") if method == "PUT" and next(is_first, False) else None
    )
    store.put_file("payloads/x", large)
    found = store.head("payloads/x")
    assert found is not None
    assert found.nbytes == _LARGE_NBYTES
    s3_proxy.plan = lambda number, method, path: Status(400, "InvalidArgument")
    with pytest.raises(StorageError, match="InvalidArgument") as caught:
        store.put_file("payloads/y", large)
    assert not isinstance(caught.value, TransientStorageError)


def test_a_bucket_that_stays_away_is_a_transient_error_in_bounded_time(s3_url: str, s3_proxy: Proxy) -> None:
    store = RetryingStore(open_patiently(s3_url, Patience(num_retries=0)), patience_seconds=0.5)
    s3_proxy.plan = lambda number, method, path: Cut()
    for ask in (lambda: store.get("x"), lambda: store.put_if_absent("x", b""), lambda: list(store.list(""))):
        with pytest.raises(TransientStorageError):
            ask()


def test_a_store_that_ignores_create_only_is_refused(s3_url: str, s3_proxy: Proxy, tmp_path: Path) -> None:
    s3_proxy.dropped_headers = frozenset({"if-none-match"})
    store = open_store(s3_url)
    assert list(store.list("")) == []
    folder = write_checkpoint_folder(tmp_path / "checkpoint", 0)
    for write in (
        lambda: store.put_if_absent("commits/1", b"one"),
        lambda: check_writable(store),
        lambda: commit_folder(Chain(store), folder),
    ):
        with pytest.raises(StorageError, match="create-only"):
            write()
    assert list(store.list("")) == []


def test_the_proof_is_asked_for_once_a_process(s3_url: str, s3_proxy: Proxy) -> None:
    open_store(s3_url).put_if_absent("a", b"")
    open_store(s3_url).put_if_absent("b", b"")
    check_writable(open_store(s3_url))
    assert len([1 for method, path in s3_proxy.requests if method == "PUT" and "/probes/" in path]) == 2


def test_a_missing_bucket_is_named(s3_url: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/chain")
    (tmp_path / "file").write_bytes(b"payload")
    for ask in (
        lambda: store.get("x"),
        lambda: list(store.list("")),
        lambda: store.put_if_absent("x", b""),
        lambda: store.put_file("x", tmp_path / "file"),
    ):
        with pytest.raises(StorageError, match="no such bucket"):
            ask()


@pytest.mark.parametrize("code", [401, 403])
def test_refused_access_says_what_to_do(s3_url: str, s3_proxy: Proxy, code: int) -> None:
    s3_proxy.plan = lambda number, method, path: Status(code)
    store = open_store(s3_url)
    for ask in (lambda: store.get("x"), lambda: list(store.list("")), lambda: store.put_if_absent("x", b"")):
        with pytest.raises(StorageError, match="credentials") as caught:
            ask()
        assert not isinstance(caught.value, TransientStorageError)
    assert len(s3_proxy.requests) == 3


def test_without_credentials_the_error_says_so(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match="SecretAccessKey"):
        open_store(s3_url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="no credentials") as caught:
        open_store(s3_url).get("x")
    assert not isinstance(caught.value, TransientStorageError)


def test_given_keys_shut_out_those_of_the_environment(
    s3_url: str, s3_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the environment")
    store = open_s3(
        "s3://given", s3_url.split("/")[2], "p", endpoint=f"http://127.0.0.1:{s3_proxy.port}",
        access_key_id="k", secret_access_key="s", region="us-east-1",
    )  # fmt: skip
    store.put_if_absent("x", b"1")
    assert store.get("x") == b"1"


def test_a_profile_of_the_user_is_read(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[tester]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "tester")
    store = open_store(s3_url)
    store.put_if_absent("x", b"1")
    assert store.get("x") == b"1"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match="nobody"):
        open_store(s3_url)


@pytest.mark.parametrize(
    "url",
    [
        "s3:///prefix", "s3://key@bucket/x", "s3://bucket/x?region=y", "s3://", "gs://", "s3://bucket/a?", "s3://bucket/a#b",
        "s3://bu cket/x", "s3://bucket:80/x", "s3://[bucket/x", "s3://bucket/a/../b", "s3://bucket/a//b", "s3://bucket//a",
        "s3://bucket/a/%2e%2e/b", "s3://bucket/a\nb", "gs://bucket/.", "",
        "file:///x/a#b", "file:///x/a?b", "file://host/x", "file://", "file:x",
    ],
)  # fmt: skip
def test_urls_that_name_no_bucket(url: str) -> None:
    with pytest.raises(InputError):
        open_store(url)


def test_file_urls_are_quoted_and_paths_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "a#b?c d%20"
    by_path = open_store(str(folder))
    by_path.put("x", b"1")
    assert (folder / "x").read_bytes() == b"1"
    assert open_store(by_path.url).get("x") == b"1"


def test_a_bucket_without_a_prefix(s3_url: str) -> None:
    bucket = open_store("/".join(s3_url.split("/")[:3]))
    bucket.put_if_absent("a/1", b"one")
    open_store(s3_url).put("x", b"")
    assert [info.key for info in bucket.list("")] == ["a/1", "chains/toy/x"]
    assert [info.key for info in bucket.list("a/")] == ["a/1"]


def test_missing_objects_are_not_found(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        _bare(s3_url).get_file("no", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_one_room_imports_the_client() -> None:
    package = Path(objects.__file__).parents[2]
    imports = re.compile(r"^\s*(import|from) obstore", re.MULTILINE)
    importing = {path.parent for path in package.rglob("*.py") if imports.search(path.read_text())}
    assert importing == {Path(objects.__file__).parent}


@pytest.mark.process
def test_help_and_local_buckets_do_not_load_the_client(tmp_path: Path) -> None:
    code = f"""
import sys
from weightline.cli.main import app
from weightline.store import open_store
open_store({str(tmp_path)!r}).put("a", b"")
assert "obstore" not in sys.modules, "obstore"
assert "huggingface_hub" not in sys.modules, "huggingface_hub"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_SECONDS)


def _read_in_child(url: str, key: str, answers: Connection) -> None:
    try:
        answers.send(open_store(url).get(key))
    except StorageError as error:
        answers.send(str(error))
    # A forked child must not run the exit handlers that the test session registered in its parent.
    os._exit(0)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_spawned_processes_work_and_forked_ones_are_told(s3_url: str, method: str) -> None:
    store = open_store(s3_url)
    store.put("x", b"1")
    context = multiprocessing.get_context(method)
    answers, child_end = context.Pipe(duplex=False)
    child = context.Process(target=_read_in_child, args=(s3_url, "x", child_end))
    child.start()
    child_end.close()
    with answers:
        assert answers.poll(60), "the child did not answer"
        answer = answers.recv()
    child.join(60)
    assert child.exitcode == 0
    if method == "spawn":
        assert answer == b"1"
    else:
        assert re.search("forked.*spawn", answer)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_store_from_before_a_fork_is_refused_in_the_child(s3_url: str) -> None:
    store = open_store(s3_url)
    store.put("x", b"1")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store.get("x")
        except StorageError as error:
            os.write(write_end, str(error).encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        assert "forked" in pipe.read()
    os.waitpid(child, 0)
