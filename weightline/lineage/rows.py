"""One row a version: what it is, how well it scored, since when it is served. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weightline.format.manifest import Manifest

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LineageRow:
    """A version with what happened to it since its commit."""

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
    """`done`, `skipped`, `failed`, or `waiting` where no record says otherwise."""
    score: float | None
    serving: str
    """`done`, `skipped`, `failed` or `waiting`."""
    served_at: str | None
    """UTC, when the first replica began to answer with this version."""
    pause_seconds: float | None

    @property
    def changed_fraction(self) -> float:
        """Changed elements of all elements, 0..1. 1 for an anchor: it brings every element."""
        return self.num_changed / self.num_elements if self.num_elements else 0.0

    @property
    def ratio_to_full(self) -> float:
        """Payload bytes of the bytes of the whole state."""
        return self.payload_nbytes / self.full_nbytes if self.full_nbytes else 0.0


def lineage_rows(
    manifests: Iterable[Manifest], evaluations: Iterable[Record], refreshes: Iterable[Record]
) -> tuple[LineageRow, ...]:
    """Rows in the manifests' order. Records of versions that are not among the manifests are left out."""
    evaluations_of, refreshes_of = _by_version(evaluations), _by_version(refreshes)
    return tuple(_row(m, evaluations_of[m.version], refreshes_of[m.version]) for m in manifests)


def is_settled(row: LineageRow) -> bool:
    """Whether nothing more will happen to the version by itself: evaluated or skipped, and offered to serving."""
    return row.evaluation != "waiting" and row.serving != "waiting"


def _by_version(records: Iterable[Record]) -> defaultdict[int, list[Record]]:
    found: defaultdict[int, list[Record]] = defaultdict(list)
    for record in records:
        found[record["version"]].append(record)
    return found


def _row(manifest: Manifest, evaluations: list[Record], refreshes: list[Record]) -> LineageRow:
    evaluation, refresh = _telling(evaluations), _telling(refreshes)
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
        evaluation=evaluation.get("status", "waiting"),
        score=evaluation.get("score"),
        serving=refresh.get("status", "waiting"),
        served_at=refresh.get("served_at"),
        pause_seconds=refresh.get("pause_seconds"),
    )


def _telling(records: list[Record]) -> Record:
    """The record that says most: one that is done before one that is not; among equals the one recorded first."""
    if not records:
        return {}
    return min(records, key=lambda record: (record.get("status") != "done", record.get("recorded_at", "")))
