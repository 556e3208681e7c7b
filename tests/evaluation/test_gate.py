"""The gate of serving: a score that is too low, or fell too far."""

from __future__ import annotations

from typing import Any

import pytest

from weightline.errors import InputError
from weightline.evaluation.gate import ReferenceScore, ScoreGate, baseline_of, judge


def _record(version: int, score: float | None, **fields: Any) -> dict[str, Any]:
    return {"version": version, "status": "done", "score": score} | fields


@pytest.mark.parametrize(
    ("gate", "score", "baseline", "says"),
    [
        (ScoreGate(), 0.0, 0.9, None),
        (ScoreGate(min_score=0.5), 0.5, None, None),
        (ScoreGate(min_score=0.5), 0.49, None, "its score 0.49 is below 0.5"),
        (ScoreGate(max_drop=0.05), 0.76, 0.8, None),
        (ScoreGate(max_drop=0.05), 0.75, 0.8, "fell by 6.3 %, from 0.8 at version 3 to 0.75: at most 5 %"),
        (ScoreGate(max_drop=0.0), 0.8, 0.8, None),
        (ScoreGate(max_drop=0.0), 0.7999, 0.8, "fell by"),
        (ScoreGate(max_drop=0.05), 0.9, 0.1, None),
        (ScoreGate(max_drop=0.05), 0.0, None, None),
        (ScoreGate(max_drop=0.5), -0.1, 0.0, "fell by 100.0 %"),
        (ScoreGate(max_drop=0.5), -1.6, -1.0, "fell by 60.0 %"),
        (ScoreGate(min_score=0.2, max_drop=0.5), 0.3, 0.8, "fell by 62.5 %"),
    ],
)
def test_the_verdict(gate: ScoreGate, score: float, baseline: float | None, says: str | None) -> None:
    verdict = judge(gate, _record(7, score), None if baseline is None else ReferenceScore(3, baseline))
    assert verdict.passed is (says is None)
    assert (verdict.reason is None) if says is None else (says in str(verdict.reason))


def test_what_was_not_measured_does_not_pass_a_gate_that_is_not_open() -> None:
    skipped = {"version": 7, "status": "skipped", "newer_version": 9}
    verdict = judge(ScoreGate(min_score=0.1), skipped, None)
    assert verdict.reason == "it was not measured, since version 9 replaced it"
    assert judge(ScoreGate(), skipped, None).passed
    assert not judge(ScoreGate(min_score=0.1), {"status": "failed", "score": 1.0}, None).passed


@pytest.mark.parametrize("score", [float("nan"), float("inf"), "0.9"])
def test_a_score_that_is_no_number_was_not_measured(score: Any) -> None:
    assert not judge(ScoreGate(min_score=0.1), _record(7, score), None).passed
    assert not judge(ScoreGate(max_drop=0.1), _record(7, score), ReferenceScore(3, 0.8)).passed
    assert baseline_of([_record(1, 0.1), _record(2, score)], 2) == ReferenceScore(1, 0.1)


def test_the_baseline_is_the_version_served_before_or_the_newest_measured_one_up_to_it() -> None:
    records = [_record(1, 0.1), _record(3, 0.3), {"version": 4, "status": "skipped"}, _record(6, 0.6), _record(5, None)]
    assert baseline_of(records, 3) == ReferenceScore(3, 0.3)
    assert baseline_of(records, 5) == ReferenceScore(3, 0.3)
    assert baseline_of(records, 9) == ReferenceScore(6, 0.6)
    assert baseline_of(records, 0) is None
    assert baseline_of(records, None) is None


def test_a_drop_is_a_share() -> None:
    with pytest.raises(InputError, match="max_drop is 5"):
        ScoreGate(max_drop=5)
    with pytest.raises(InputError, match="max_drop is nan"):
        ScoreGate(max_drop=float("nan"))
    with pytest.raises(InputError, match="min_score is nan"):
        ScoreGate(min_score=float("nan"))
