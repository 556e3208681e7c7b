"""Which versions are owed what: a pure plan."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tasks.reconciling import (
    CHAINS_VARIABLE,
    EVALUATE,
    REFRESH,
    WINDOW_SECONDS,
    Missing,
    configured_chains,
    plan_announcements,
    plan_reconcile,
)
from tasks.run_folder import prepare_run
from tests.chains import commit_state, nudged, random_state
from tests.flows.recipes import write_recipe
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


def test_what_waits_or_goes_on_is_not_started_again() -> None:
    planned = plan_reconcile(_chain("busy").manifests(), [], [], LATER, under_way={(EVALUATE, 0), (REFRESH, 1)})
    assert [(one.version, one.deployment) for one in planned] == [(0, REFRESH), (1, EVALUATE)]


def test_an_event_that_the_server_lacks_is_sent_while_it_would_be_kept() -> None:
    manifests = _chain("unheard").manifests()
    long_ago = datetime.now(UTC) - timedelta(days=1)
    assert plan_announcements(manifests, set(), LATER, long_ago) == manifests
    assert plan_announcements(manifests, {manifests[0].commit_id}, LATER, long_ago) == manifests[1:]
    assert plan_announcements(manifests, set(), long_ago, long_ago) == ()
    assert plan_announcements(manifests, set(), LATER, LATER) == ()


def test_all_configured_chains_are_looked_after_newest_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured_chains(tmp_path) == ([], [])
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text("{}")
    older, newer = (prepare_run(write_recipe(tmp_path), tmp_path, name) for name in ("older", "newer"))
    os.utime(older.folder / "run.json", (1, 1))
    assert configured_chains(tmp_path) == ([], [newer.chain_url, older.chain_url])
    monkeypatch.setenv(CHAINS_VARIABLE, f"s3://bucket/chain {older.chain_url}")
    assert configured_chains(tmp_path) == (["s3://bucket/chain", older.chain_url], [newer.chain_url])
