"""Records of refreshes: no version is forgotten."""

from __future__ import annotations

import uuid

import pytest

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import REFRESHES, last_recorded, read_record, read_records, write_record
from weightline.errors import StorageError
from weightline.serving.replica.following import record_refresh
from weightline.serving.replica.status import RefreshFacts
from weightline.store.memory import MemoryStore


@pytest.fixture
def chain() -> Chain:
    made = open_chain(f"memory://{uuid.uuid4().hex}/toy")
    states = [random_state(0)]
    commit_state(made, states[0])
    for version in range(1, 6):
        states.append(nudged(states[-1], version))
        commit_state(made, states[-1], states[-2])
    return made


def _facts(version: int) -> RefreshFacts:
    return RefreshFacts(
        replica="r0", version=version, commit_id="c" * 32, from_version=None, served_at=f"at-{version}",
        pause_seconds=0.5, drain_seconds=0.0, prepare_seconds=1.0, num_changed=3, payload_nbytes=9,
    )  # fmt: skip


def _told(chain: Chain, replica: str = "r0") -> dict[int, object]:
    found = (record for record in read_records(chain, REFRESHES) if record["name"] == replica)
    return {record["version"]: record.get("newer_version", record["status"]) for record in found}


def test_versions_passed_over_are_recorded_as_skipped(chain: Chain) -> None:
    record_refresh(chain, 1, "r0", _facts(1))
    assert _told(chain) == {1: "done"}, "a replica without a record is new and passed over nothing"
    record = record_refresh(chain, 4, "r0", _facts(4))
    assert _told(chain) == {1: "done", 2: 4, 3: 4, 4: "done"}
    assert record.items() >= {"status": "done", "served_at": "at-4", "pause_seconds": 0.5, "num_changed": 3}.items()
    assert "replica" not in record
    assert _told(chain, "r1") == {}


def test_a_request_that_came_too_late_gets_the_skip(chain: Chain) -> None:
    """Asked for 2, the replica answered that it serves 3 already."""
    record = record_refresh(chain, 2, "r0", _facts(3))
    assert record.items() >= {"version": 2, "status": "skipped", "newer_version": 3}.items()
    assert _told(chain) == {2: 3, 3: "done"}


def test_a_version_above_the_served_one_is_not_recorded_as_skipped_for_good(chain: Chain) -> None:
    record_refresh(chain, 2, "r0", _facts(2))
    assert read_record(chain, REFRESHES, 3, "r0") is None


def test_repeating_changes_nothing(chain: Chain) -> None:
    first = record_refresh(chain, 3, "r0", _facts(3))
    assert record_refresh(chain, 3, "r0", _facts(3)) == first


class _FailingStore:
    """Fails at the n-th create-only put, like a crash there."""

    def __init__(self, store: MemoryStore, fails_at: int) -> None:
        self._store, self._left = store, fails_at

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def put_if_absent(self, key: str, body: bytes) -> None:
        if self._left == 0:
            raise StorageError("crashed")
        self._left -= 1
        self._store.put_if_absent(key, body)


def test_a_crash_between_any_two_records_leaves_no_version_forgotten(chain: Chain) -> None:
    assert isinstance(chain.store, MemoryStore)
    for crash_at in range(4):
        replica = f"r{crash_at}"
        record_refresh(chain, 0, replica, _facts(0))
        with pytest.raises(StorageError, match="crashed"):
            record_refresh(Chain(_FailingStore(chain.store, crash_at)), 4, replica, _facts(4))  # type: ignore[arg-type]
        record_refresh(chain, 5, replica, _facts(5))
        assert _told(chain, replica).keys() == set(range(6))


def test_the_last_recorded_version_is_found_however_far_below_it_is(chain: Chain) -> None:
    """Records need no version: these lie in three of the ranges that are listed one after the other."""
    for version in (3, 700, 5000):
        write_record(chain, REFRESHES, version, "r0", {"status": "done"})
        write_record(chain, REFRESHES, version + 1, "r1", {"status": "done"})
    assert [last_recorded(chain, REFRESHES, "r0", below) for below in (5010, 5001, 5000, 700, 3, 0)] == [
        5000, 5000, 700, 3, None, None,
    ]  # fmt: skip
    assert last_recorded(chain, REFRESHES, "r2", 5010) is None
