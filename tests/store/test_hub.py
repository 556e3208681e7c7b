"""A Hub bucket with the real clients: what it checks, what it says, what it costs. The store suite runs elsewhere."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest

from tests.hub_emulator import Cut, Fault, HubEmulator, LoseReply, Status, Truncate
from tests.store.hub_fixtures import gateway_environment
from tests.waiting import PATIENCE_SECONDS
from weightline.chain.replay.fetch import fetch_object
from weightline.errors import (
    CorruptError,
    DigestMismatchError,
    InputError,
    NotFoundError,
    ObjectExistsError,
    StorageError,
    TransientStorageError,
)
from weightline.format.manifest import PayloadRef
from weightline.store import open_store
from weightline.store.hub.store import HubStore, open_hub, parse_hub_url


def _bucket_id(url: str) -> str:
    return parse_hub_url(url).bucket_id


def _path(url: str, key: str) -> str:
    return f"{parse_hub_url(url).root}{key}"


@pytest.fixture(params=["claims", "s3-gateway"])
def store(request: pytest.FixtureRequest, hub_url: str) -> HubStore:
    if request.param == "s3-gateway":
        request.getfixturevalue("hub_s3_url")
    opened = open_hub(hub_url)
    assert opened.commit_mode == request.param
    return opened


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "payload"
    path.write_bytes(os.urandom(300_000))
    return path


def test_the_first_write_creates_the_bucket_private(hub: HubEmulator, store: HubStore, payload: Path) -> None:
    assert list(store.list("")) == []
    assert store.head("x") is None
    assert _bucket_id(store.url) not in hub.buckets
    store.put_file("payloads/x", payload)
    assert hub.buckets[_bucket_id(store.url)].is_private


@pytest.mark.parametrize("verb", ["put_if_absent", "put"])
def test_every_verb_that_writes_may_be_the_first(store: HubStore, verb: str) -> None:
    getattr(store, verb)("commits/1.json", b"one")
    assert store.get("commits/1.json") == b"one"


def test_create_only_in_both_modes_meets_the_other(
    hub: HubEmulator, hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_claims = open_hub(hub_url)
    for name, value in gateway_environment(hub.url).items():
        monkeypatch.setenv(name, value)
    by_gateway = open_hub(hub_url)
    for first, second, key in ((by_claims, by_gateway, "a"), (by_gateway, by_claims, "b")):
        first.put_if_absent(key, b"first")
        with pytest.raises(ObjectExistsError):
            second.put_if_absent(key, b"second")
        assert second.get(key) == b"first"
        assert second.contests() == ()


def test_a_writer_with_keys_joins_the_claims_of_a_key(
    hub: HubEmulator, hub_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim stands already, its writer is gone: the gateway's writer finishes it instead of writing over it."""
    by_claims = open_hub(hub_url)
    _claim(by_claims, "commits/1.json", b"first")
    for name, value in gateway_environment(hub.url).items():
        monkeypatch.setenv(name, value)
    store = open_hub(hub_url)
    with pytest.raises(ObjectExistsError):
        store.put_if_absent("commits/1.json", b"second")
    assert store.get("commits/1.json") == b"first"


def _claim(store: HubStore, key: str, body: bytes) -> None:
    """What a writer leaves that stops right after its claim."""
    bucket, claims = store._bucket, store._claims
    bucket.write(f"{claims.folder(key)}abandoned", bucket.upload(body))


def test_listings_come_in_pages(hub: HubEmulator, store: HubStore) -> None:
    hub.page_nitems = 3
    names = [f"commits/{number:03d}.json" for number in range(10)]
    for name in reversed(names):
        store.put(name, b"x")
    assert [info.key for info in store.list("commits/")] == names
    assert [info.key for info in store.list("commits/", names[4])] == names[5:]
    assert [info.key for info in store.list("commits/00")] == names
    assert list(store.list("commits/000.json/")) == []


def test_an_objects_age_is_by_the_hubs_clock(
    hub: HubEmulator, store: HubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "clock", lambda: 1_000_000_000.0)
    store.put("x", b"1")
    infos = [store.head("x"), *store.list("")]
    assert [info and info.modified_at.year for info in infos] == [2001, 2001]


def test_a_flipped_bit_is_refused_and_nothing_is_left(
    hub: HubEmulator, store: HubStore, payload: Path, tmp_path: Path
) -> None:
    """By the content hash here, and by the manifest's sha256 in the chain, each by itself."""
    store.put_file("payloads/x", payload)
    hub.flip_bit(_bucket_id(store.url), _path(store.url, "payloads/x"))
    for read in (lambda: store.get("payloads/x"), lambda: store.get_file("payloads/x", tmp_path / "out")):
        with pytest.raises(DigestMismatchError):
            read()
    assert [path.name for path in tmp_path.iterdir()] == ["payload"]


def test_the_chain_refuses_what_the_hub_calls_right(
    hub: HubEmulator, store: HubStore, payload: Path, tmp_path: Path
) -> None:
    """Other bytes under a valid content hash: only the manifest's sha256 tells."""
    wanted = PayloadRef(
        key="payloads/x", nbytes=300_000, sha256=hashlib.sha256(payload.read_bytes()).hexdigest(), rank=0
    )
    store.put_file("payloads/x", payload)
    fetch_object(store, wanted, tmp_path / "good")
    assert (tmp_path / "good").read_bytes() == payload.read_bytes()
    store.put("payloads/x", b"\0" + payload.read_bytes()[1:])
    with pytest.raises(DigestMismatchError):
        fetch_object(store, wanted, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_truncated_download_is_never_taken(hub: HubEmulator, store: HubStore, payload: Path, tmp_path: Path) -> None:
    store.put_file("payloads/x", payload)
    hub.fault_plan = lambda number, method, path: Truncate() if path.startswith("/xorb/") else None
    with pytest.raises((TransientStorageError, CorruptError)):
        store.get_file("payloads/x", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["payload"]
    hub.fault_plan = None
    store.get_file("payloads/x", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == payload.read_bytes()


def test_an_operation_that_fails_inside_a_200_is_not_silent(hub: HubEmulator, store: HubStore, payload: Path) -> None:
    path = _path(store.url, "payloads/x")
    hub.failing_paths[path] = 1
    with pytest.raises(TransientStorageError, match="failed"):
        store.put_file("payloads/x", payload)
    store.put_file("payloads/x", payload)
    hub.failing_paths[path] = 1
    with pytest.raises(TransientStorageError, match="failed"):
        store.put("payloads/x", b"other")
    assert store.get("payloads/x") == payload.read_bytes()


def test_an_upload_that_does_not_show_is_an_error(hub: HubEmulator, hub_url: str, payload: Path) -> None:
    hub.info_lag_seconds = 60.0
    with pytest.raises(TransientStorageError, match="is missing"):
        open_hub(hub_url, write_visible_pauses_seconds=(0.0, 0.01)).put_file("payloads/x", payload)


@pytest.mark.parametrize("fault", [Cut(), LoseReply(), Status(429), Status(503)], ids=str)
def test_passing_failures_are_waited_out(
    hub: HubEmulator, store: HubStore, payload: Path, tmp_path: Path, hurried: None, fault: Fault
) -> None:
    """A fifth of all requests fails."""
    random = Random(1)
    hub.fault_plan = lambda number, method, path: fault if random.random() < 0.2 else None
    patient = open_store(store.url)
    patient.put_file("payloads/x", payload)
    patient.put("hints/tip.json", b"hint")
    patient.get_file("payloads/x", tmp_path / "out")
    assert patient.get("hints/tip.json") == b"hint"
    assert (tmp_path / "out").read_bytes() == payload.read_bytes()
    patient.put_if_absent("commits/1.json", b"one")
    assert patient.get("commits/1.json") == b"one"
    patient.delete("payloads/x")
    assert [info.key for info in patient.list("")] == ["commits/1.json", "hints/tip.json"]


def test_a_hub_that_stays_away_is_transient(hub: HubEmulator, store: HubStore, payload: Path, hurried: None) -> None:
    store.put("x", b"1")
    for fault in (Cut(), Status(503), Status(429)):
        hub.fault_plan = lambda number, method, path, fault=fault: fault  # type: ignore[misc]
        for ask in (
            lambda: store.get("x"),
            lambda: list(store.list("")),
            lambda: store.put("x", b"2"),
            lambda: store.put_file("y", payload),
            lambda: store.put_if_absent("z", b"3"),
        ):
            with pytest.raises(TransientStorageError):
                ask()


@pytest.mark.parametrize(("role", "says"), [("none", "HF_TOKEN"), ("read", "write permission")])
def test_a_token_that_may_not_write_says_what_to_do(
    hub: HubEmulator, hub_url: str, payload: Path, role: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_hub(hub_url).put("x", b"1")
    monkeypatch.setenv("HF_TOKEN", "hf_weak")
    hub.roles["hf_weak"] = role
    store = open_hub(hub_url)
    for write in (
        lambda: store.put("x", b"2"),
        lambda: store.put_file("y", payload),
        lambda: store.put_if_absent("z", b"3"),
        lambda: store.delete("x"),
    ):
        with pytest.raises(StorageError, match=says) as caught:
            write()
        assert not isinstance(caught.value, TransientStorageError)
    if role == "read":
        assert store.get("x") == b"1"
        with pytest.raises(StorageError, match="not allowed to create"):
            open_hub("hf://buckets/user/none").put("x", b"2")


@pytest.mark.parametrize(
    "url",
    ["hf://user/model", "hf://buckets/user", "hf://buckets/", "hf://buckets/us er/x", "hf://buckets/u/x/../y",
     "hf://buckets/u/x//y", "hf://buckets/u/x?y", "hf://datasets/u/x/y"],
)  # fmt: skip
def test_bad_urls(hub: HubEmulator, url: str) -> None:
    with pytest.raises(InputError):
        open_hub(url)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("WEIGHTLINE_HUB_SETTLE_SECONDS", "soon"), ("WEIGHTLINE_HUB_SETTLE_SECONDS", "0"),
     ("HF_S3_ACCESS_KEY_ID", "HFAKx"), ("HF_TOKEN", "hf_a b")],
)  # fmt: skip
def test_bad_settings(hub_url: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError):
        open_hub(hub_url)


def test_an_endpoint_that_is_no_hub_is_named(hub: HubEmulator, hub_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/nothing-here")
    with pytest.raises((StorageError, NotFoundError)):
        open_hub(hub_url).get("x")


def test_what_a_commit_costs(hub: HubEmulator, store: HubStore, payload: Path) -> None:
    """Requests of the Hub's API, which allows 1000 in five minutes. The first of a process fetch tokens."""
    store.put("warm", b"up")
    store.get("warm")

    def num_requests() -> int:
        num, _ = len(hub.hub_requests()), hub.requests.clear()
        return num

    num_requests()
    store.put_if_absent("commits/1.json", b"one")
    assert num_requests() == (6 if store.commit_mode == "claims" else 2)
    store.put_file("payloads/x", payload)
    assert num_requests() == 3
    store.get("commits/1.json")
    assert num_requests() == 1
    store.put("hints/tip.json", b"hint")
    assert num_requests() == 1
    list(store.list("commits/"))
    assert num_requests() == 1


def test_eight_threads(store: HubStore, payload: Path, tmp_path: Path) -> None:
    def round_trip(number: int) -> bytes:
        store.put_file(f"payloads/{number}", payload)
        store.put_if_absent(f"commits/{number}", str(number).encode())
        store.get_file(f"payloads/{number}", tmp_path / f"out-{number}")
        assert (tmp_path / f"out-{number}").read_bytes() == payload.read_bytes()
        return store.get(f"commits/{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(round_trip, range(8))) == [str(number).encode() for number in range(8)]


def _read_in_child(url: str, answers: object) -> None:
    answers.put(open_hub(url).get("x"))  # type: ignore[attr-defined]


def test_spawned_processes(store: HubStore) -> None:
    store.put("x", b"1")
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(store.url, answers))
    child.start()
    assert answers.get(timeout=PATIENCE_SECONDS) == b"1"
    child.join(60)


@pytest.mark.process
def test_the_client_is_not_loaded_for_other_stores(tmp_path: Path) -> None:
    code = f"""
import sys
from weightline.store import open_store
list(open_store({tmp_path.as_uri()!r}).list(""))
assert not {{"huggingface_hub", "hf_xet"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_SECONDS)
