"""Which versions are owed what: a pure plan."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, recorded_versions, write_record
from weightline.format import keys
from weightline.lineage.owed import (
    MAX_ATTEMPTS,
    MAX_STARTED,
    Attempt,
    ConsumerRun,
    ExhaustedRecord,
    MissingRecord,
    lacking_versions,
    next_step,
    plan_announcements,
    plan_missing,
    plan_runs,
    read_manifests,
    take_turns,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = datetime.now(UTC) + timedelta(hours=1)
BOTH = {0: (EVALUATIONS, REFRESHES), 1: (EVALUATIONS, REFRESHES)}


def _chain(name: str) -> Chain:
    chain = open_chain(f"memory://{name}")
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    return chain


def _missing(version: int, kind: str = EVALUATIONS, chain: str = "memory://x") -> MissingRecord:
    return MissingRecord(chain, version, f"{version:032x}", kind)


def test_every_version_is_owed_both_until_a_record_stands() -> None:
    assert lacking_versions([0, 1], set(), set()) == BOTH
    assert lacking_versions([0, 1], {0}, {1}) == {0: (REFRESHES,), 1: (EVALUATIONS,)}
    assert lacking_versions([0, 1], {0, 1}, {0, 1}) == {}
    chain = _chain("owed")
    planned = plan_missing(chain.url, chain.manifests(), {0: (REFRESHES,), 1: (EVALUATIONS,)}, LATER)
    assert [(one.version, one.kind) for one in planned] == [(0, REFRESHES), (1, EVALUATIONS)]


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
    under_way = {
        ConsumerRun(EVALUATIONS, chain.url, 0),
        ConsumerRun(REFRESHES, chain.url, 1),
        ConsumerRun(REFRESHES, "memory://another", 0),
    }
    planned = plan_missing(chain.url, chain.manifests(), BOTH, LATER, under_way)
    assert [(one.version, one.kind) for one in planned] == [(0, REFRESHES), (1, EVALUATIONS)]


def test_a_failed_run_is_started_again_ever_later_and_given_up_in_the_end() -> None:
    assert next_step([], NOW) == "start"
    assert next_step([None], NOW) == "wait"
    ends = [NOW]
    for number in range(1, MAX_ATTEMPTS + 1):
        pause = timedelta(seconds=300 * 2 ** (number - 1))
        assert next_step(ends, ends[-1] + pause - timedelta(seconds=1)) == "wait"
        expected = "start" if number < MAX_ATTEMPTS else "give up"
        assert next_step(ends, ends[-1] + pause) == expected
        ends.append(ends[-1] + pause)
    assert next_step([NOW], NOW + timedelta(seconds=9), retry_seconds=10) == "wait"
    assert next_step([NOW], NOW + timedelta(seconds=10), retry_seconds=10) == "start"


def test_a_record_that_no_run_made_is_exhausted_with_the_last_message() -> None:
    exhausted, tried_once, new = (_missing(version) for version in range(3))
    failed = Attempt(NOW, "no such task")
    attempts = {exhausted: [failed] * MAX_ATTEMPTS, tried_once: [failed]}
    to_start, given_up = plan_runs([exhausted, tried_once, new], attempts, NOW + timedelta(days=1))
    assert [(one.version, one.num_attempts) for one in to_start] == [(1, 1), (2, 0)]
    assert given_up == (ExhaustedRecord(exhausted, "no such task"),)
    assert plan_runs([tried_once], {tried_once: [failed]}, NOW, retry_seconds=60) == ((), ())


def test_every_chain_has_its_turn_and_no_consumer_too_much() -> None:
    long = [_missing(version, chain="memory://long") for version in range(100)]
    short = [_missing(7, chain="memory://short"), _missing(7, REFRESHES, chain="memory://short")]
    started = take_turns([long, short], frozenset())
    assert started[:3] == (long[0], short[0], long[1])
    assert started[-1] == short[1]
    assert len(started) == MAX_STARTED + 1
    busy = {ConsumerRun(EVALUATIONS, "memory://x", version) for version in range(MAX_STARTED + 5)}
    assert take_turns([long, short], busy) == (short[1],)


def test_an_event_that_the_server_lacks_is_sent_while_it_would_be_kept() -> None:
    manifests = _chain("unheard").manifests()
    long_ago = datetime.now(UTC) - timedelta(days=1)
    assert plan_announcements(manifests, set(), LATER, long_ago) == manifests
    assert plan_announcements(manifests, {manifests[0].commit_id}, LATER, long_ago) == manifests[1:]
    assert plan_announcements(manifests, set(), long_ago, long_ago) == ()
    assert plan_announcements(manifests, set(), LATER, LATER) == ()
