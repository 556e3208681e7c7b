"""Replicas that move by themselves: how often they look, at what, and what they leave behind in the bucket."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chains import AT_ONCE
from tests.serving.model_chains import ModelChain, make_chain
from tests.serving.servers import running_replica
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain import Chain
from weightline.chain.read.leases import Lease, live_leases, read_lease, read_leases
from weightline.chain.read.records import REFRESHES, read_records
from weightline.chain.read.refs import move_ref
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before
from weightline.errors import InputError, StorageError
from weightline.format import keys
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.http.service import ReplicaService
from weightline.serving.replica.following import Follower, Following
from weightline.serving.replica.registration import Presence, Registration
from weightline.serving.replica.replica import Replica
from weightline.serving.replica.status import ReplicaStatus, error_text
from weightline.store.base import ObjectInfo
from weightline.store.memory import MemoryStore

OFTEN = Following(0.05)


@pytest.fixture
def grown() -> ModelChain:
    return make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=2)


class _Counting:
    """A store that counts requests, and fails while told to."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.requests: list[str] = []
        self.is_down = False
        self.fault: Exception | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def get(self, key: str, *limit: int) -> bytes:
        self._count(f"get {key}")
        return self._store.get(key, *limit)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        self._count(f"list {prefix}")
        return self._store.list(prefix, start_after)

    def put(self, key: str, body: bytes) -> None:
        self._count(f"put {key}")
        self._store.put(key, body)

    def _count(self, request: str) -> None:
        if self.is_down:
            raise StorageError("the bucket is down")
        if self.fault is not None:
            raise self.fault
        self.requests.append(request)


def _counting(grown: ModelChain) -> tuple[Chain, _Counting]:
    assert isinstance(grown.chain.store, MemoryStore)
    store = _Counting(grown.chain.store)
    return Chain(store), store  # type: ignore[arg-type]


def test_waits_are_jittered_grow_with_failures_and_are_bounded() -> None:
    following = Following(10.0)
    assert [following.wait_seconds(0, draw) for draw in (0.0, 0.5)] == [8.0, 10.0]
    assert following.wait_seconds(0, 0.999) < 12.0
    assert [following.wait_seconds(failures, 0.5) for failures in (1, 2, 3, 4, 99)] == [20.0, 40.0, 80.0, 80.0, 80.0]
    assert len({following.wait_seconds(0) for _ in range(9)}) > 1
    for seconds in (0, -1, 10**6):
        with pytest.raises(InputError, match="cannot follow"):
            Following(seconds)


def test_a_look_is_a_listing_and_reads_no_manifest(grown: ModelChain) -> None:
    chain, store = _counting(grown)
    tip, serving = Follower(chain, Following(1.0)), Follower(chain, Following(1.0, "serving"))
    assert (tip.target(), serving.target()) == (1, None)
    move_ref(grown.chain, "serving", 1)
    assert serving.target() == 1
    store.requests.clear()
    for _ in range(3):
        assert (tip.target(), serving.target()) == (1, 1)
    assert store.requests == ["get hints/tip.json", "list commits/", "list refs/serving/"] * 3


def test_who_follows_a_ref_goes_where_it_goes_and_nowhere_else(grown: ModelChain, tmp_path: Path) -> None:
    move_ref(grown.chain, "serving", 0)
    with running_replica(grown.chain, tmp_path / "r", "r", following=Following(0.05, "serving")) as running:
        wait_until(lambda: running.replica.version == 0)
        move_ref(grown.chain, "serving", 1)
        wait_until(lambda: running.replica.version == 1)
        grown.grow()
        move_ref(grown.chain, "serving", 0)
        wait_until(lambda: running.replica.version == 0)
        assert running.service.status().follows == "serving"
    told = [(record["version"], record["status"]) for record in read_records(grown.chain, REFRESHES)]
    assert told == [(0, "done"), (1, "done")]


def test_a_replica_that_was_away_catches_up_by_itself(grown: ModelChain, tmp_path: Path) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r", following=OFTEN) as running:
        wait_until(lambda: running.replica.version == 1)
    for _ in range(3):
        grown.grow()
    assert live_leases(grown.chain) == ()
    with running_replica(grown.chain, tmp_path / "r", "r", following=OFTEN) as running:
        wait_until(lambda: running.replica.version == 4)
        wait_until(lambda: read_records(grown.chain, REFRESHES)[-1]["version"] == 4)
    told = {record["version"]: record["status"] for record in read_records(grown.chain, REFRESHES)}
    assert told == {1: "done", 2: "skipped", 3: "skipped", 4: "done"}


def test_a_bucket_that_is_down_stops_neither_serving_nor_following(grown: ModelChain, tmp_path: Path) -> None:
    chain, store = _counting(grown)
    with running_replica(chain, tmp_path / "r", "r", following=OFTEN, ttl_seconds=0.3) as running:
        wait_until(lambda: running.replica.version == 1)
        store.is_down = True
        grown.grow()
        wait_until(lambda: running.service._registration.num_failures > 0)
        assert running.replica.version == 1
        store.is_down = False
        wait_until(lambda: running.replica.version == 2)


def _failures(service: ReplicaService, name: str, kind: str) -> float:
    labels = {"replica": service.replica.name, "kind": kind}
    return service.metrics.registry.get_sample_value(f"weightline_{name}_failures_total", labels) or 0.0


def test_no_unknown_error_ends_the_threads_of_the_lease_and_the_follower(grown: ModelChain, tmp_path: Path) -> None:
    chain, store = _counting(grown)
    with running_replica(chain, tmp_path / "r", "r", following=OFTEN, ttl_seconds=0.3) as running:
        service = running.service
        wait_until(lambda: running.replica.version == 1)
        store.fault = OSError(24, "Too many open files")
        for name in ("lease", "follow"):
            wait_until(lambda name=name: _failures(service, name, "unexpected") > 1)
        told = service.status()
        assert (told.state, told.version, told.tip_version, told.lag_seconds) == ("serving", 1, None, None)
        assert told.lease_error == told.follow_error == "OSError: [Errno 24] Too many open files"
        grown.grow()
        store.fault = None
        wait_until(lambda: running.replica.version == 2)
        wait_until(lambda: (service.status().lease_error, service.status().follow_error) == (None, None))
        wait_until(lambda: [lease.version for lease in live_leases(grown.chain)] == [2])
        assert all(thread.is_alive() for thread in service._threads)


def test_a_replica_that_follows_nothing_returns_to_its_version_once_the_bucket_answers(
    grown: ModelChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r", version=0):
        pass
    monkeypatch.setattr("weightline.serving.http.service._RECOVERY", OFTEN)
    chain, store = _counting(grown)
    store.is_down = True
    with running_replica(chain, tmp_path / "r", "r") as running:
        wait_until(lambda: _failures(running.service, "refresh", "storage") > 1)
        assert running.service._registration.moving_to == 0, "garbage collection must keep the version until then"
        store.is_down = False
        wait_until(lambda: running.replica.version == 0)


@pytest.mark.parametrize("created_at", ["2026-11-30 06:00", "yesterday", "", "9999-12-31T23:59:59-23:59", "0001-01-01"])
def test_any_text_in_created_at_leaves_status_and_lease_alone(
    grown: ModelChain, tmp_path: Path, created_at: str
) -> None:
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "r", "r")
    replica.refresh(0)
    key = keys.commit(1)
    manifest = json.loads(grown.chain.store.get(key)) | {"created_at": created_at}
    grown.chain.store.put(key, json.dumps(manifest).encode())
    replica.chain = Chain(grown.chain.store)
    service = ReplicaService(replica, None, Presence())
    lag_seconds = service.status().lag_seconds
    assert lag_seconds is None if created_at in ("yesterday", "") else lag_seconds >= 0
    assert service._registration.renew()
    assert [lease.version for lease in live_leases(grown.chain)] == [0]


def test_a_renewal_reads_nothing_from_the_disk(
    grown: ModelChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "r", "r")
    service = ReplicaService(replica, None, Presence())

    def refuse(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        for target in ("builtins.open", "io.open", "os.open", "os.scandir", "os.listdir", "os.stat"):
            patched.setattr(target, refuse)
        is_renewed = service._registration.renew()
    assert is_renewed
    assert service._registration.last_error is None


def test_a_renewal_is_tried_again_sooner_after_an_error(grown: ModelChain, tmp_path: Path) -> None:
    registration = _registration(grown.chain, tmp_path, ttl_seconds=24.0)
    assert [registration._wait_seconds(failures) for failures in range(6)] == [8.0, 1.0, 2.0, 4.0, 8.0, 8.0]


def test_an_error_that_is_no_text_can_still_be_shown() -> None:
    assert error_text(StorageError("a\ud800b")) == "a?b"
    assert error_text(ValueError("x" * 9999)) == "ValueError: " + "x" * 988


def test_the_lease_tells_where_the_replica_stands_and_that_it_left(grown: ModelChain, tmp_path: Path) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r-1", version=0, ttl_seconds=5.0) as running:
        (lease,) = live_leases(grown.chain)
        assert (lease.replica, lease.url, lease.engine) == ("r-1", running.url, "transformers")
        assert (lease.state, lease.version, lease.lag_versions, lease.follows) == ("serving", 0, 1, None)
        assert lease.commit_id == grown.chain.manifest(0).commit_id
        assert lease.lag_seconds is not None
        assert lease.lag_seconds > 0
        running.service.refresh(1)
        wait_until(lambda: live_leases(grown.chain)[0].version == 1)
        (lease,) = live_leases(grown.chain)
        assert (lease.version, lease.lag_versions, lease.lag_seconds, lease.moving_to) == (1, 0, 0.0, None)
    held = read_lease(grown.chain, "r-1")
    assert held is not None
    assert held.lease.state == "ended"


def test_a_replica_behind_the_horizon_is_not_cut_off_while_it_lives(grown: ModelChain, tmp_path: Path) -> None:
    """History is expired and collected under it; it moves on in place, by the anchor, and back to where it stood."""
    for _ in range(3):
        grown.grow()
    with running_replica(grown.chain, tmp_path / "r", "r", version=1) as running:
        expire_before(grown.chain, 4)
        collect(grown.chain, plan_gc(view_chain(grown.chain), grace=AT_ONCE))
        assert Chain(grown.chain.store).versions() == (0, 1, 4)
        facts = running.service.refresh(4)
        assert (facts.from_version, facts.version) == (1, 4)
        assert 0 < facts.num_changed < grown.chain.manifest(4).num_elements
    (held,) = read_leases(grown.chain)
    assert held.lease.version == 4


def test_a_lease_is_renewed_while_nothing_happens(grown: ModelChain, tmp_path: Path) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r", version=0, ttl_seconds=0.2):
        first = read_lease(grown.chain, "r")
        wait_until(lambda: read_lease(grown.chain, "r").modified_at > first.modified_at)


def test_the_lease_says_where_a_replica_goes_before_anything_is_read_on_the_way(
    grown: ModelChain, tmp_path: Path
) -> None:
    chain, store = _counting(grown)
    replica = Replica(chain, TransformersEngine("cpu"), tmp_path / "r", "r")
    service = ReplicaService(replica, None, Presence())
    seen: list[int | None] = []
    load = replica.engine.load

    def watched(folder: Path) -> None:
        held = read_lease(grown.chain, "r")
        seen.append(held.lease.moving_to if held else None)
        load(folder)

    replica.engine.load = watched  # type: ignore[method-assign]
    service.refresh(1)
    assert seen == [1]
    assert store.requests.index("put records/replicas/r/lease.json") < store.requests.index(
        "get commits/00000000000000000001.json"
    )


def test_a_move_to_the_tip_waits_for_no_write_of_the_lease(grown: ModelChain, tmp_path: Path) -> None:
    """The bucket takes no lease while the replica moves, and gets it afterwards."""
    chain, store = _counting(grown)
    may_write = threading.Event()
    may_write.set()
    put = store.put

    def held_up(key: str, body: bytes) -> None:
        assert may_write.wait(PATIENCE_SECONDS)
        put(key, body)

    store.put = held_up  # type: ignore[method-assign]
    with running_replica(chain, tmp_path / "r", "r", version=0) as running:
        may_write.clear()
        assert running.service.refresh(1).version == 1
        assert [lease.version for lease in live_leases(grown.chain)] == [0]
        may_write.set()
        wait_until(lambda: live_leases(grown.chain)[0].version == 1)


def test_a_step_to_the_next_version_reads_little(grown: ModelChain, tmp_path: Path) -> None:
    """Its manifest, that of the version before, and its payload: no listing."""
    chain, store = _counting(grown)
    replica = Replica(chain, TransformersEngine("cpu"), tmp_path / "r", "r")
    replica.refresh(0)
    store.requests.clear()
    replica.refresh(1)
    assert store.requests == ["get commits/00000000000000000001.json", "get commits/00000000000000000000.json"]


def test_a_requested_move_of_a_replica_that_follows_is_recorded_as_its_own(grown: ModelChain, tmp_path: Path) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r", following=Following(3600.0)) as running:
        wait_until(lambda: running.replica.version == 1)
        for version in (2, 3):
            grown.grow()
            running.service.refresh(version)
        wait_until(lambda: len(read_records(grown.chain, REFRESHES)) == 3)
    assert [record["status"] for record in read_records(grown.chain, REFRESHES)] == ["done"] * 3


def test_a_name_belongs_to_one_living_replica(grown: ModelChain, tmp_path: Path) -> None:
    with running_replica(grown.chain, tmp_path / "r", "r", version=0):
        stranger = ReplicaService(
            Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "s", "r"), None, Presence()
        )
        with pytest.raises(InputError, match=r"a replica 'r' of .* is alive on"):
            stranger.start()
        # The same state folder: a restart after kill -9, within the lease.
        again = ReplicaService(Replica(grown.chain, TransformersEngine("cpu"), tmp_path / "r", "r"), None, Presence())
        again.start()
        again.close()
    stranger.start()
    stranger.close()


def _registration(chain: Chain, state_dir: Path, ttl_seconds: float = 30.0) -> Registration:
    status = ReplicaStatus(
        replica="r", chain=chain.url, engine="e", state="serving", version=0, commit_id=None, served_at=None,
        last_error=None,
    )  # fmt: skip
    return Registration(chain, state_dir, Presence(ttl_seconds=ttl_seconds), lambda: status)


def test_of_two_that_claim_a_free_name_at_once_one_leaves(grown: ModelChain, tmp_path: Path) -> None:
    first, second = (_registration(grown.chain, tmp_path / name) for name in "ab")
    write = first._write

    def overtaken(lease: Lease) -> None:
        write(lease)
        # The other one looked before that, and writes after it.
        second._write(second._lease(second._status()))

    first._write = overtaken  # type: ignore[method-assign]
    with pytest.raises(InputError, match="give this one another --name"):
        first.claim()


def test_who_was_away_too_long_takes_no_name_back_and_ends_nobodys_lease(grown: ModelChain, tmp_path: Path) -> None:
    away = _registration(grown.chain, tmp_path / "a", ttl_seconds=0.05)
    away.claim()
    wait_until(lambda: live_leases(grown.chain) == ())
    heir = _registration(grown.chain, tmp_path / "b")
    heir.claim()
    (lease,) = live_leases(grown.chain)
    away.renew()
    away.end()
    assert live_leases(grown.chain) == (lease,)
    heir.end()
    assert live_leases(grown.chain) == ()


def test_a_restart_announces_the_version_that_it_comes_back_to(grown: ModelChain, tmp_path: Path) -> None:
    """From its first lease on: what it comes back to may be gone by then, but is not collected from then on."""
    with running_replica(grown.chain, tmp_path / "r", "r", version=0):
        pass
    grown.chain.store.delete("records/replicas/r/lease.json")
    chain, store = _counting(grown)
    seen: list[frozenset[int]] = []
    put = store.put

    def watched(key: str, body: bytes) -> None:
        put(key, body)
        seen.extend(lease.versions for lease in live_leases(grown.chain))

    store.put = watched  # type: ignore[method-assign]
    with running_replica(chain, tmp_path / "r", "r") as running:
        wait_until(lambda: running.replica.version == 0)
    assert set(seen) == {frozenset({0})}
