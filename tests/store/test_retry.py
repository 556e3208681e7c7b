"""How long the house asks again: as long as the bucket is away, not as long as a transfer takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from weightline.errors import ObjectExistsError, TransientStorageError
from weightline.store import retry
from weightline.store.memory import MemoryStore
from weightline.store.retry import PATIENCE_SECONDS, RetryingStore
from weightline.testing.faults import FaultStore

_ALWAYS = 10**9


@dataclass(slots=True)
class Clock:
    """Time that passes only where a test says so."""

    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def _failing(clock: Clock, times: int, seconds: float) -> FaultStore:
    """A store whose first `times` operations each work for so long and then fail."""

    def plan(number: int, verb: str, key: str) -> None:
        clock.now += seconds
        if number < times:
            raise TransientStorageError(f"{verb} of {key} was cut, as planned", key=key)

    inner = MemoryStore()
    inner.put("payloads/x", b"payload")
    return FaultStore(inner, plan)


def _hurried(store: FaultStore) -> RetryingStore:
    return RetryingStore(store, pause_seconds=0.001)


@pytest.mark.parametrize("verb", ["put_file", "get_file"])
def test_a_transfer_that_takes_longer_than_the_patience_is_repeated(clock: Clock, tmp_path: Path, verb: str) -> None:
    store = _failing(clock, times=3, seconds=10 * PATIENCE_SECONDS)
    (tmp_path / "file").write_bytes(b"payload")
    getattr(_hurried(store), verb)("payloads/x", tmp_path / "file")
    assert store.num_operations == 4
    assert store.inner.get("payloads/x") == (tmp_path / "file").read_bytes() == b"payload"


def test_transfers_that_always_break_end(clock: Clock, tmp_path: Path) -> None:
    store = _failing(clock, times=_ALWAYS, seconds=10 * PATIENCE_SECONDS)
    with pytest.raises(TransientStorageError):
        _hurried(store).get_file("payloads/x", tmp_path / "file")
    assert store.num_operations == retry._MAX_LONG_TRIES


@pytest.mark.parametrize(("seconds", "num_tries"), [(36.0, 2), (6.0, 10)])
def test_a_bucket_that_is_away_is_asked_for_a_minute(clock: Clock, seconds: float, num_tries: int) -> None:
    store = _failing(clock, times=_ALWAYS, seconds=seconds)
    with pytest.raises(TransientStorageError):
        _hurried(store).get("payloads/x")
    assert store.num_operations == num_tries


def test_a_long_try_begins_the_patience_anew(clock: Clock) -> None:
    seconds = iter([20.0, 20.0, 100.0, 20.0, 20.0, 20.0, 20.0])

    def plan(number: int, verb: str, key: str) -> None:
        clock.now += next(seconds)
        raise TransientStorageError("cut, as planned", key=key)

    store = FaultStore(MemoryStore(), plan)
    with pytest.raises(TransientStorageError):
        _hurried(store).get("payloads/x")
    assert store.num_operations == 6


def test_an_object_that_is_said_to_exist_and_does_not_is_asked_for_again() -> None:
    """As S3 says 409 to create-only puts that met while none of them won."""
    inner = MemoryStore()

    def plan(number: int, verb: str, key: str) -> None:
        if number == 0:
            raise ObjectExistsError(f"{key} exists, as planned", key=key)

    _hurried(FaultStore(inner, plan))._create("commits/1", b"mine")
    assert inner.get("commits/1") == b"mine"


def test_pauses_grow_to_a_bound_and_are_random(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    pauses: list[list[float]] = []

    def nap(seconds: float) -> None:
        pauses[-1].append(seconds)
        clock.now += seconds

    monkeypatch.setattr("tenacity.nap.time.sleep", nap)
    for _ in range(20):
        pauses.append([])
        with pytest.raises(TransientStorageError):
            RetryingStore(_failing(clock, _ALWAYS, 0.0)).get("payloads/x")
    bounds = [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0]
    for number, bound in enumerate(bounds):
        drawn = [run[number] for run in pauses]
        assert 0.5 * bound < max(drawn) <= bound
        assert len(set(drawn)) == len(pauses)
    assert max(map(max, pauses)) <= 10.0
    assert all(PATIENCE_SECONDS <= sum(run) < PATIENCE_SECONDS + 10.0 for run in pauses)
