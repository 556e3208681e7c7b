"""What a Prefect server's runs say about the records that versions are owed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Failed, Running, Scheduled

from weightline.chain.read.records import EVALUATIONS, REFRESHES
from weightline.deployments.server.consumer_runs import MAX_SECONDS, attempts_of, ended_at, idempotency_keys
from weightline.lineage.owed import MAX_ATTEMPTS, Attempt, MissingRecord

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _missing(version: int, kind: str = EVALUATIONS, chain: str = "memory://x") -> MissingRecord:
    return MissingRecord(chain, version, f"{version:032x}", kind)


def test_each_run_has_a_key_of_its_own() -> None:
    records = [_missing(3), _missing(3, REFRESHES), _missing(3, chain="memory://y")]
    keys = [key for record in records for key in idempotency_keys(record)]
    assert len(set(keys)) == 3 * MAX_ATTEMPTS
    assert idempotency_keys(_missing(3)) == idempotency_keys(_missing(3))


def test_a_run_that_goes_on_for_too_long_has_ended() -> None:
    def run(state: object) -> FlowRun:
        return FlowRun.model_validate({"flow_id": uuid4(), "state": state})

    long_ago = NOW - timedelta(seconds=MAX_SECONDS + 1)
    assert ended_at(run(Running(timestamp=NOW)), NOW) is None
    assert ended_at(run(Running(timestamp=long_ago)), NOW) == long_ago
    assert ended_at(run(Scheduled(scheduled_time=long_ago, timestamp=long_ago)), NOW) is None
    assert ended_at(run(Crashed(timestamp=NOW)), NOW) == NOW


def test_runs_are_the_attempts_at_the_record_whose_key_they_bear() -> None:
    first, second, untried = (_missing(version) for version in range(3))
    failed = FlowRun(flow_id=uuid4(), state=Failed(message="no such task", timestamp=NOW))
    going_on = FlowRun(flow_id=uuid4(), state=Running(timestamp=NOW))
    runs = {
        idempotency_keys(first)[0]: failed, idempotency_keys(first)[1]: going_on, idempotency_keys(second)[0]: going_on,
    }  # fmt: skip
    attempts = attempts_of([first, second, untried], runs, NOW)
    assert attempts[first][0] == Attempt(NOW, "no such task")
    assert [attempt.ended_at for attempt in attempts[first]] == [NOW, None]
    assert [attempt.ended_at for attempt in attempts[second]] == [None]
    assert attempts[untried] == ()
