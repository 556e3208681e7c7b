"""Whether a version is good enough to be served: its score, and how far it fell below the one before it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite

from weightline.chain.read.records import Record
from weightline.errors import InputError

#: 0.80 to 0.76 is a drop of 0.05000000000000004.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class ScoreGate:
    """What a version must reach. Scores are those where more is better. Both None: everything passes."""

    min_score: float | None = None
    max_drop: float | None = None
    """Largest relative drop against the version that was served before: 0.05 lets 0.80 fall to 0.76."""

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
    """The score to compare with, and the version that had it."""

    version: int
    score: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is None when the version passed."""

    score: float | None
    baseline: ReferenceScore | None
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None


def measured_score(record: Record) -> float | None:
    """The score of a finished evaluation. What is not a number compares as neither better nor worse: it is none."""
    score = record.get("score")
    return score if record.get("status") == "done" and isinstance(score, int | float) and isfinite(score) else None


def baseline_of(records: Iterable[Record], served: int | None) -> ReferenceScore | None:
    """The score of the version that was served before; where it has none, that of the newest before it which has."""
    scored = [(r["version"], score) for r in records if (score := measured_score(r)) is not None]
    before = [one for one in scored if served is not None and one[0] <= served]
    return ReferenceScore(*max(before)) if before else None


def judge(gate: ScoreGate, record: Record, baseline: ReferenceScore | None) -> Verdict:
    """The verdict on an evaluation's record. A version that was not measured does not pass a gate that is not open.

    Without a baseline there is nothing to fall below.
    """
    score = measured_score(record)
    if gate.is_open:
        return Verdict(score, baseline, None)
    if score is None:
        newer = record.get("newer_version")
        why = f": version {newer} took its place" if newer is not None else ""
        return Verdict(None, baseline, f"it was not measured{why}")
    if gate.min_score is not None and score < gate.min_score:
        return Verdict(score, baseline, f"its score {score:g} is below {gate.min_score:g}")
    if gate.max_drop is not None and baseline is not None and score < baseline.score:
        drop = (baseline.score - score) / abs(baseline.score) if baseline.score else 1.0
        if drop > gate.max_drop + _ROUNDING:
            told = f"its score fell by {100 * drop:.1f} %, from {baseline.score:g} at version {baseline.version} to"
            return Verdict(score, baseline, f"{told} {score:g}: at most {100 * gate.max_drop:g} % are allowed")
    return Verdict(score, baseline, None)
