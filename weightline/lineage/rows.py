"""The rows of the lineage: one per version, with its facts, its score, and the time since which it is served. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightline.format.manifest import Header, Origin, parse_time

Record = Mapping[str, Any]
_STALENESS = ("rollout/staleness_mean", "rollout/staleness_max")


@dataclass(frozen=True, slots=True)
class LineageRow:
    """A version with the results of its evaluation and its refreshes."""

    version: int
    stage: str
    kind: str
    global_step: int
    run_id: str
    is_milestone: bool
    base_version: int | None
    reverts_to: int | None
    num_changed: int
    num_elements: int
    payload_nbytes: int
    full_nbytes: int
    evaluation: str
    """`done`, `skipped` or `failed`; `waiting` without a record."""
    score: float | None
    serving: str
    """`done`, `skipped`, `failed` or `waiting`."""
    served_at: str | None
    """UTC time at which the first replica began to answer with this version."""
    pause_seconds: float | None
    created_at: str = ""
    """UTC time by the writer's clock."""
    commit_id: str = ""
    forked_from: Origin | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers that the trainer logged at this step."""

    @property
    def changed_fraction(self) -> float:
        """Returns the share of changed elements, 0 to 1. It is 1 for an anchor, which contains every element."""
        return self.num_changed / self.num_elements if self.num_elements else 0.0

    @property
    def ratio_to_full(self) -> float:
        """Returns the payload bytes as a share of the bytes of the whole state."""
        return self.payload_nbytes / self.full_nbytes if self.full_nbytes else 0.0

    @property
    def staleness(self) -> tuple[float, float] | None:
        """Returns the mean and the largest age, in versions, of the samples of this step; None if none are known."""
        mean, largest = (self.metrics.get(name) for name in _STALENESS)
        return None if mean is None or largest is None else (mean, largest)

    @property
    def lag_seconds(self) -> float | None:
        """Returns the time from the commit to the first answer with this version; None while it is not served.

        The two times come from two clocks.
        """
        committed, served = parse_time(self.created_at), parse_time(self.served_at)
        return None if committed is None or served is None else (served - committed).total_seconds()


def lineage_rows(
    manifests: Iterable[Header],
    evaluations: Iterable[Record],
    refreshes: Iterable[Record],
    logged: Iterable[Record] = (),
) -> tuple[LineageRow, ...]:
    """Returns rows in the manifests' order. Records of versions that are not among the manifests are left out."""
    evaluations_of, refreshes_of, logged_of = _by_version(evaluations), _by_version(refreshes), _by_version(logged)
    return tuple(
        with_records(row_of(m), evaluations_of[m.version], refreshes_of[m.version], logged_of[m.version])
        for m in manifests
    )


def row_of(manifest: Header) -> LineageRow:
    """Returns the row of a version without any record."""
    return LineageRow(
        version=manifest.version,
        stage=manifest.stage,
        kind=manifest.kind,
        global_step=manifest.global_step,
        run_id=manifest.run_id,
        is_milestone=manifest.is_milestone,
        base_version=manifest.base_version,
        reverts_to=manifest.reverts_to,
        num_changed=manifest.num_changed,
        num_elements=manifest.num_elements,
        payload_nbytes=manifest.payload_nbytes,
        full_nbytes=manifest.full_nbytes,
        evaluation="waiting",
        score=None,
        serving="waiting",
        served_at=None,
        pause_seconds=None,
        created_at=manifest.created_at,
        commit_id=manifest.commit_id,
        forked_from=manifest.forked_from,
        metrics=manifest.metrics,
    )


def with_records(
    row: LineageRow, evaluations: Iterable[Record], refreshes: Iterable[Record], logged: Iterable[Record] = ()
) -> LineageRow:
    """Returns the row completed by its version's records."""
    evaluation, refresh = _decisive(evaluations), _decisive(refreshes)
    return replace(
        row,
        evaluation=evaluation.get("status", "waiting"),
        score=evaluation.get("score"),
        serving=refresh.get("status", "waiting"),
        served_at=refresh.get("served_at"),
        pause_seconds=refresh.get("pause_seconds"),
        metrics={**_logged_metrics(logged), **row.metrics},
    )


def is_settled(row: LineageRow) -> bool:
    """Returns whether the version has records of an evaluation and a refresh, of any status."""
    return row.evaluation != "waiting" and row.serving != "waiting"


def _by_version(records: Iterable[Record]) -> defaultdict[int, list[Record]]:
    found: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        found[record["version"]].append(record)
    return found


def _logged_metrics(logged: Iterable[Record]) -> dict[str, float]:
    """Returns what was logged after the commit. Of several values of a name, the last recorded one."""
    found: dict[str, float] = {}
    for record in sorted(logged, key=lambda record: str(record.get("recorded_at", ""))):
        metrics = record.get("metrics")
        found |= metrics if isinstance(metrics, dict) else {}
    return found


def _decisive(records: Iterable[Record]) -> Record:
    """Returns the record that determines the row: `done` before any other status, then the one recorded first."""
    return min(records, key=lambda record: (record.get("status") != "done", record.get("recorded_at", "")), default={})
