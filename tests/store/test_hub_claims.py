"""The claim protocol: pure decisions, and a writer that stops at any request."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hub_emulator import Cut, Fault, HubEmulator, Late, LoseReply, Status
from weightline.errors import ObjectExistsError, StorageError, TransientStorageError
from weightline.store import Store, open_store
from weightline.store.hub.bucket import HubFile
from weightline.store.hub.claims import first_claim, judge
from weightline.store.hub.content import Content
from weightline.store.hub.store import HubStore, open_hub
from weightline.store.open import check_writable

KEY = "commits/00000000000000000007.json"
_START = datetime(2026, 1, 1, tzinfo=UTC)


def _file(path: str, body: str, at_ms: int) -> HubFile:
    return HubFile(path, Content(body, len(body)), _START + timedelta(milliseconds=at_ms))


CLAIM_LISTS = st.lists(
    st.builds(_file, st.text("ab", min_size=1, max_size=4), st.sampled_from("xyz"), st.integers(0, 3)),
    min_size=1, unique_by=lambda claim: claim.path,
)  # fmt: skip


@given(CLAIM_LISTS, st.randoms())
def test_the_first_claim_is_the_same_for_everybody(claims: list[HubFile], random: object) -> None:
    shuffled = list(claims)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    winner = first_claim(shuffled)
    assert winner == first_claim(claims)
    assert winner is not None
    assert all((winner.uploaded_at, winner.path) <= (c.uploaded_at, c.path) for c in claims)


@given(CLAIM_LISTS, st.integers(4, 9))
def test_a_later_claim_never_wins(claims: list[HubFile], at_ms: int) -> None:
    assert first_claim([*claims, _file("aaaaa", "x", at_ms)]) == first_claim(claims)


def test_judging() -> None:
    mine, again, other = _file("c/a", "x", 1), _file("c/b", "x", 2), _file("c/c", "y", 3)
    assert judge("k", [], None) is None
    assert judge("k", [mine, again], _file("k", "x", 4)) is None
    kinds = [
        contest and contest.kind
        for contest in (
            judge("k", [mine], None),
            judge("k", [mine, other], None),
            judge("k", [mine, other], _file("k", "x", 4)),
            judge("k", [mine], _file("k", "y", 4)),
        )
    ]
    assert kinds == ["unpublished", "unpublished", "fork", "fork"]
    assert judge("k", [mine], None) == judge("k", [mine, other], None)


@pytest.fixture
def store(hub: HubEmulator, hub_url: str, hurried: None) -> HubStore:
    store = open_hub(hub_url)
    store.put("warm", b"up")
    hub.requests.clear()
    return store


def _attempt(store: Store, body: bytes) -> str:
    """What the writer is told: `won`, `lost` or `unknown`."""
    try:
        store.put_if_absent(KEY, body)
    except ObjectExistsError:
        return "lost"
    except TransientStorageError:
        return "unknown"
    return "won"


def _num_requests(hub: HubEmulator, url: str) -> int:
    store = open_hub(url)
    hub.requests.clear()
    assert _attempt(store, b"measured") == "won"
    num = len(hub.requests)
    store.delete(KEY)
    return num


@pytest.mark.parametrize("last", [Cut(), LoseReply()], ids=["cut", "lost reply"])
def test_a_writer_that_stops_at_any_request(hub: HubEmulator, store: HubStore, last: Fault) -> None:
    """Its connection dies for good at request n. Whoever comes next wins, or finishes what the first one won."""
    outcomes = set()
    for failing in range(_num_requests(hub, store.url)):
        hub.requests.clear()

        def plan(number: int, method: str, path: str, failing: int = failing) -> Fault | None:
            return None if number < failing else last if number == failing else Cut()

        hub.fault_plan = plan
        bodies = [f"{name} {failing}".encode() for name in ("first", "second")]
        first = _attempt(open_hub(store.url), bodies[0])
        is_hit = len(hub.requests) > failing
        hub.fault_plan = None
        second = _attempt(open_hub(store.url), bodies[1])
        assert (first, second) in ({("unknown", "won"), ("unknown", "lost")} if is_hit else {("won", "lost")})
        assert store.get(KEY) == (bodies[1] if second == "won" else bodies[0])
        assert store.contests() == ()
        outcomes.add(second)
        store.delete(KEY)
    assert outcomes == {"won", "lost"}


@pytest.mark.parametrize("fault", [Cut(), LoseReply(), Status(503), Status(429)], ids=str)
def test_one_failure_at_any_request_is_waited_out(hub: HubEmulator, store: HubStore, fault: Fault) -> None:
    check_writable(open_store(store.url))
    for failing in range(_num_requests(hub, store.url)):
        hub.requests.clear()
        hub.fault_plan = lambda number, method, path, failing=failing: fault if number == failing else None  # type: ignore[misc]
        assert _attempt(open_store(store.url), b"mine") == "won"
        hub.fault_plan = None
        assert store.get(KEY) == b"mine"
        assert _attempt(store, b"other") == "lost"
        assert store.contests() == ()
        store.delete(KEY)


def test_a_claim_is_sent_once_and_then_under_another_name(hub: HubEmulator, store: HubStore) -> None:
    """A repeated claim would be stamped anew: the first of two could become the second after it was acknowledged."""
    left = 1

    def plan(number: int, method: str, path: str) -> Fault | None:
        nonlocal left
        if path.endswith("/batch") and left:
            left -= 1
            return Cut()
        return None

    hub.fault_plan = plan
    store.put_if_absent(KEY, b"mine")
    claims = [claim.path for claim in store._claims.claims(KEY)]
    assert len(claims) == 1
    batches = [path for _, path in hub.requests if path.endswith("/batch")]
    assert len(batches) == 4  # the cut claim, the next one, the object, the withdrawal of the cut one


def test_a_claim_that_lands_late_loses(hub: HubEmulator, store: HubStore) -> None:
    """The reply is lost and the request takes effect long after another writer committed."""
    is_first = True

    def plan(number: int, method: str, path: str) -> Fault | None:
        nonlocal is_first
        if path.endswith("/batch") and is_first:
            is_first = False
            return Late(0.5)
        return Cut() if path.endswith("/batch") else None

    hub.fault_plan = plan
    assert _attempt(open_hub(store.url), b"late") == "unknown"
    hub.fault_plan = None
    assert _attempt(store, b"prompt") == "won"
    time.sleep(0.7)
    assert store.get(KEY) == b"prompt"
    assert [contest.kind for contest in store.contests()] == ["fork"]  # nobody withdrew it: shown, not hidden
    assert _attempt(store, b"third") == "lost"
    assert store.get(KEY) == b"prompt"


def test_listings_that_lag_only_cost_time(hub: HubEmulator, store: HubStore) -> None:
    hub.list_lag_seconds = 0.4
    assert _attempt(store, b"first") == "won"
    hub.info_lag_seconds = 0.4
    assert _attempt(open_hub(store.url), b"second") == "lost"
    assert store.get(KEY) == b"first"


def test_a_claim_that_never_shows_decides_nothing(hub: HubEmulator, store: HubStore) -> None:
    hub.list_lag_seconds = 60.0
    assert _attempt(open_hub(store.url, claim_visible_seconds=0.3), b"first") == "unknown"
    assert store.head(KEY) is None
    hub.list_lag_seconds = 0.0
    assert [contest.kind for contest in store.contests()] == ["unpublished"]
    assert _attempt(store, b"second") == "lost"
    assert store.get(KEY) == b"first"
    assert store.contests() == ()


def test_claims_of_one_millisecond_have_one_winner(
    hub: HubEmulator, store: HubStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "clock", lambda: 1_700_000_000.0)
    claims, bucket = store._claims, store._bucket
    for name, body in (("-b", b"later by name"), ("-a", b"first by name")):
        bucket.write(f"{claims.folder(KEY)}{name}", bucket.upload(body))
    with pytest.raises(ObjectExistsError):
        store.put_if_absent(KEY, b"third")
    assert store.get(KEY) == b"first by name"


def test_claims_without_a_stamp_are_refused(hub: HubEmulator, store: HubStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.hub_emulator.hub_routes.iso", lambda ms: None)
    with pytest.raises(StorageError, match="no upload time"):
        store.put_if_absent(KEY, b"mine")


def test_deleting_an_object_takes_its_claims(hub: HubEmulator, store: HubStore, hub_url: str) -> None:
    store.put_if_absent(KEY, b"one")
    store.delete(KEY)
    bucket = hub.buckets[store._bucket.bucket_id]
    assert list(bucket.files()) == ["chains/toy/warm"]
    store.put_if_absent(KEY, b"two")
    assert store.get(KEY) == b"two"
