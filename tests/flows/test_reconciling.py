"""Which versions are owed what: a pure plan."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from tasks.reconciling import EVALUATE, REFRESH, WINDOW_SECONDS, Missing, newest_chain, plan_reconcile
from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain

LATER = datetime.now(UTC) + timedelta(hours=1)


def _chain(name: str) -> Chain:
    chain = open_chain(f"memory://{name}")
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    return chain


def test_every_version_is_owed_both_until_a_record_stands() -> None:
    manifests = _chain("owed").manifests()
    evaluations = [{"version": 0, "status": "skipped"}]
    refreshes = [{"version": 1, "status": "done"}]
    planned = plan_reconcile(manifests, evaluations, refreshes, LATER)
    assert [(one.version, one.deployment) for one in planned] == [(0, REFRESH), (1, EVALUATE)]
    assert plan_reconcile(manifests, [*evaluations, {"version": 1}], [*refreshes, {"version": 0}], LATER) == ()


def test_young_versions_are_left_to_their_events() -> None:
    manifests = _chain("young").manifests()
    assert plan_reconcile(manifests, [], [], datetime.now(UTC) - timedelta(minutes=1)) == ()


def test_the_oldest_come_first_and_not_too_many_at_once() -> None:
    planned = plan_reconcile(_chain("many").manifests(), [], [], LATER, max_started=3)
    assert [one.version for one in planned] == [0, 0, 1]


def test_a_crashed_run_is_started_again_in_the_next_window() -> None:
    missing = Missing(3, "ab" * 16, EVALUATE)
    assert missing.idempotency_key(10.0) == missing.idempotency_key(20.0)
    assert missing.idempotency_key(10.0) != missing.idempotency_key(10.0 + WINDOW_SECONDS)
    assert missing.idempotency_key(10.0) != Missing(3, "ab" * 16, REFRESH).idempotency_key(10.0)


def test_a_folder_without_runs_has_no_chain(tmp_path: Path) -> None:
    assert newest_chain(tmp_path) is None
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text("{}")
    assert newest_chain(tmp_path) is None
