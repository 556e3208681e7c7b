"""Which versions are owed what: a pure plan."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Failed, Running, Scheduled

from tests.chains import commit_state, nudged, random_state
from tests.runs.recipes import write_recipe
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, recorded_versions, write_record
from weightline.deployments.server.consumer_runs import (
    EVALUATE,
    MAX_RUNS,
    MAX_SECONDS,
    REFRESH,
    Missing,
    ended_at,
    next_step,
)
from weightline.format import keys
from weightline.runs.folder import prepare_run
from weightline.tasks.reconcile import (
    CHAINS_VARIABLE,
    MAX_STARTED,
    configured_chains,
    lacking_versions,
    plan_announcements,
    plan_missing,
    read_manifests,
    sort_out,
    take_turns,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(hours=1)
BOTH = {0: (EVALUATE, REFRESH), 1: (EVALUATE, REFRESH)}


def _chain(name: str) -> Chain:
    chain = open_chain(f"memory://{name}")
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    return chain


def _missing(version: int, deployment: str = EVALUATE, chain: str = "memory://x") -> Missing:
    return Missing(chain, version, f"{version:032x}", deployment)


def test_every_version_is_owed_both_until_a_record_stands() -> None:
    assert lacking_versions([0, 1], set(), set()) == BOTH
    assert lacking_versions([0, 1], {0}, {1}) == {0: (REFRESH,), 1: (EVALUATE,)}
    assert lacking_versions([0, 1], {0, 1}, {0, 1}) == {}
    chain = _chain("owed")
    planned = plan_missing(chain.url, chain.manifests(), {0: (REFRESH,), 1: (EVALUATE,)}, LATER)
    assert [(one.version, one.deployment) for one in planned] == [(0, REFRESH), (1, EVALUATE)]


def test_a_version_with_both_records_is_not_read() -> None:
    """Versions with records are known by their keys; a torn manifest among the others hides none of them."""
    chain = _chain("torn")
    write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "done"})
    assert recorded_versions(chain, EVALUATIONS) == {0}
    chain.store.put(keys.commit(0), b"{torn")
    manifests, errors = read_manifests(open_chain(chain.url), [0, 1])
    assert [manifest.version for manifest in manifests] == [1]
    assert len(errors) == 1
    assert read_manifests(open_chain(chain.url), [1])[1] == ()


def test_young_versions_are_left_to_their_events() -> None:
    chain = _chain("young")
    assert plan_missing(chain.url, chain.manifests(), BOTH, datetime.now(UTC) - timedelta(minutes=1)) == ()


def test_what_waits_or_goes_on_is_not_started_again() -> None:
    chain = _chain("busy")
    under_way = {(EVALUATE, chain.url, 0), (REFRESH, chain.url, 1), (REFRESH, "memory://another", 0)}
    planned = plan_missing(chain.url, chain.manifests(), BOTH, LATER, under_way)
    assert [(one.version, one.deployment) for one in planned] == [(0, REFRESH), (1, EVALUATE)]


def test_a_failed_run_is_started_again_ever_later_and_given_up_in_the_end() -> None:
    assert next_step([], NOW) == "start"
    assert next_step([None], NOW) == "wait"
    ends = [NOW]
    for number in range(1, MAX_RUNS + 1):
        pause = timedelta(seconds=300 * 2 ** (number - 1))
        assert next_step(ends, ends[-1] + pause - timedelta(seconds=1)) == "wait"
        expected = "start" if number < MAX_RUNS else "give up"
        assert next_step(ends, ends[-1] + pause) == expected
        ends.append(ends[-1] + pause)


def test_each_run_has_a_key_of_its_own() -> None:
    all_keys = {*_missing(3).idempotency_keys, *_missing(3, REFRESH).idempotency_keys}
    assert len(all_keys | {*_missing(3, chain="memory://y").idempotency_keys}) == 3 * MAX_RUNS
    assert _missing(3).idempotency_key == _missing(3).idempotency_keys[0]


def test_a_run_that_goes_on_for_too_long_has_ended() -> None:
    def run(state: object) -> FlowRun:
        return FlowRun.model_validate({"flow_id": uuid4(), "state": state})

    long_ago = NOW - timedelta(seconds=MAX_SECONDS + 1)
    assert ended_at(run(Running(timestamp=NOW)), NOW) is None
    assert ended_at(run(Running(timestamp=long_ago)), NOW) == long_ago
    assert ended_at(run(Scheduled(scheduled_time=long_ago, timestamp=long_ago)), NOW) is None
    assert ended_at(run(Crashed(timestamp=NOW)), NOW) == NOW


def test_what_no_run_brought_about_is_given_up_with_the_last_word() -> None:
    exhausted, tried_once, new = (_missing(version) for version in range(3))
    failed = FlowRun(flow_id=uuid4(), state=Failed(message="no such task", timestamp=NOW))
    runs = dict.fromkeys([*exhausted.idempotency_keys, tried_once.idempotency_key], failed)
    to_start, given_up = sort_out([exhausted, tried_once, new], runs, NOW + timedelta(days=1))
    assert [one.version for one in to_start] == [1, 2]
    assert to_start[0].idempotency_key == tried_once.idempotency_keys[1]
    assert given_up == ((exhausted, "no such task"),)


def test_every_chain_has_its_turn_and_no_consumer_too_much() -> None:
    long = [_missing(version, chain="memory://long") for version in range(100)]
    short = [_missing(7, chain="memory://short"), _missing(7, REFRESH, chain="memory://short")]
    started = take_turns([long, short], frozenset())
    assert started[:3] == [long[0], short[0], long[1]]
    assert started[-1] == short[1]
    assert len(started) == MAX_STARTED + 1
    busy = {(EVALUATE, "memory://x", version) for version in range(MAX_STARTED + 5)}
    assert take_turns([long, short], busy) == [short[1]]


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
    assert configured_chains(tmp_path) == []
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text("{}")
    older, newer = (prepare_run(write_recipe(tmp_path), tmp_path, name) for name in ("older", "newer"))
    os.utime(older.folder / "run.json", (1, 1))
    assert configured_chains(tmp_path) == [newer.chain_url, older.chain_url]
    plain_path = older.chain_url.removeprefix("file://")
    monkeypatch.setenv(CHAINS_VARIABLE, f"ftp://no-bucket {plain_path}")
    assert configured_chains(tmp_path) == ["ftp://no-bucket", older.chain_url, newer.chain_url]
