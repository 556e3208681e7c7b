"""Judges whether a version may be served, by its score and by the drop of the score from the version before. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from weightline.chain.read.records import Record
from weightline.errors import InputError

#: Tolerance for rounding: the drop from 0.80 to 0.76 is computed as 0.05000000000000004.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class ScoreGate:
    """The requirements of a version. Higher scores are better. With both limits None every version passes."""

    min_score: float | None = None
    max_drop: float | None = None
    """Largest relative drop from the version that was served before: 0.05 allows a drop from 0.80 to 0.76."""

    def __post_init__(self) -> None:
        if self.min_score is not None and not isfinite(self.min_score):
            raise InputError(f"min_score is {self.min_score:g}: give a number", field="min_score")
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise InputError(f"max_drop is {self.max_drop:g}: give a share between 0 and 1", field="max_drop")

    @property
    def is_open(self) -> bool:
        return self.min_score is None and self.max_drop is None


@dataclass(frozen=True, slots=True)
class ReferenceScore:
    """A score to compare with, and its version."""

    version: int
    score: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a gate. `reason` is None when the version passed."""

    score: float | None
    baseline: ReferenceScore | None
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


def measured_score(record: Record) -> float | None:
    """Returns the score of a finished evaluation; None for other records and for scores that are not finite."""
    score = record.get("score")
    return score if record.get("status") == "done" and isinstance(score, int | float) and isfinite(score) else None


def baseline_of(records: Iterable[Record], served: int | None) -> ReferenceScore | None:
    """Returns the score of the newest version up to `served` that has one; None when there is none."""
    scored = [(r["version"], score) for r in records if (score := measured_score(r)) is not None]
    before = [one for one in scored if served is not None and one[0] <= served]
    return ReferenceScore(*max(before)) if before else None


def judge(gate: ScoreGate, record: Record, baseline: ReferenceScore | None) -> Verdict:
    """Returns the verdict on the record of an evaluation.

    A version without a score passes only a gate without limits. Without a baseline, `max_drop` is not applied.
    """
    score = measured_score(record)
    if gate.is_open:
        return Verdict(score, baseline, None)
    if score is None:
        newer = record.get("newer_version")
        why = f", since version {newer} replaced it" if newer is not None else ""
        return Verdict(None, baseline, f"it was not measured{why}")
    if gate.min_score is not None and score < gate.min_score:
        return Verdict(score, baseline, f"its score {score:g} is below {gate.min_score:g}")
    if gate.max_drop is not None and baseline is not None and score < baseline.score:
        drop = (baseline.score - score) / abs(baseline.score) if baseline.score else 1.0
        if drop > gate.max_drop + _ROUNDING:
            fall = f"its score fell by {100 * drop:.1f} %, from {baseline.score:g} at version {baseline.version} to"
            return Verdict(score, baseline, f"{fall} {score:g}: at most {100 * gate.max_drop:g} % are allowed")
    return Verdict(score, baseline, None)
