"""Manifests and records become rows; the record that says most is the one that is told."""

from __future__ import annotations

from tests.chains import commit_state, nudged, random_state
from tests.lineage.rows import row
from weightline.chain import open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, write_record
from weightline.lineage.read import read_lineage
from weightline.lineage.rows import is_settled, lineage_rows


def test_rows_of_a_real_chain_tell_what_its_records_say() -> None:
    chain = open_chain("memory://lineage-rows")
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    for seed in (1, 2):
        newer = nudged(state, seed)
        commit_state(chain, newer, state, stage="dpo")
        state = newer
    write_record(chain, EVALUATIONS, 0, "arithmetic", {"status": "done", "score": 0.25})
    write_record(chain, EVALUATIONS, 1, "arithmetic", {"status": "skipped", "newer_version": 2})
    write_record(chain, REFRESHES, 2, "replica-0", {"status": "done", "served_at": "2026-01-02T03:04:05Z"})

    first, second, third = read_lineage(chain)

    assert (first.version, first.kind, first.score, first.evaluation) == (0, "anchor", 0.25, "done")
    assert first.changed_fraction == 1.0
    assert first.payload_nbytes == chain.manifest(0).payload_nbytes
    assert (second.stage, second.evaluation, second.score, second.serving) == ("dpo", "skipped", None, "waiting")
    assert (third.serving, third.served_at) == ("done", "2026-01-02T03:04:05Z")
    assert 0 < third.changed_fraction < 0.2
    assert read_lineage(chain, max_versions=2) == (second, third)


def test_an_empty_chain_has_no_rows() -> None:
    assert read_lineage(open_chain("memory://lineage-empty")) == ()


def test_a_done_record_speaks_for_the_version_whoever_skipped_it() -> None:
    chain = open_chain("memory://lineage-two-replicas")
    manifest = commit_state(chain, random_state(0))
    skipped = {"version": 0, "status": "skipped", "recorded_at": "2026-01-01T00:00:00Z"}
    early = {"version": 0, "status": "done", "served_at": "early", "recorded_at": "2026-01-02T00:00:00Z"}
    late = {"version": 0, "status": "done", "served_at": "late", "recorded_at": "2026-01-03T00:00:00Z"}
    (told,) = lineage_rows([manifest], [], [skipped, late, early])
    assert (told.serving, told.served_at) == ("done", "early")


def test_records_of_versions_that_are_not_asked_for_are_left_out() -> None:
    assert lineage_rows([], [{"version": 7, "status": "done", "score": 1.0}], []) == ()


def test_a_version_is_settled_when_both_consumers_left_word() -> None:
    assert not is_settled(row(1))
    assert not is_settled(row(1, evaluation="done", score=1.0))
    assert is_settled(row(1, evaluation="skipped", serving="skipped"))
    assert is_settled(row(1, evaluation="failed", serving="done"))
