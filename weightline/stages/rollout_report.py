"""What a generation batch was made of: as metrics that training logs, and as a record beside the version it made.

Every number is of all ranks. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from weightline.rollouts.record import Group, ReplicaWork, SamplesRecord, Spread
from weightline.rollouts.sample import Sample
from weightline.rollouts.staleness import Lineage, staleness_of


@dataclass(frozen=True, slots=True)
class BatchReport:
    """The samples of generation batches, counted."""

    ages: Mapping[int, int]
    """Samples by their staleness."""
    made_by: Mapping[int, int]
    """Samples by the oldest version that wrote a token of them."""
    replicas: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Samples and seconds by the name of the replica that answered."""
    wait_seconds: float = 0.0
    """Time for which training stood still."""
    generate_seconds: float = 0.0
    """Time from the first request to the last answer."""
    num_regenerated: int = 0
    """Samples that were generated again, since they had become too old."""
    num_mixed: int = 0
    """Samples that several versions wrote."""
    queue_length: int = 0
    """Generation batches that were ready before they were needed."""

    @property
    def metrics(self) -> dict[str, float]:
        """Returns the numbers under the names by which training logs them."""
        num_samples = sum(self.ages.values())
        return {
            "rollout/wait_seconds": self.wait_seconds,
            "rollout/generate_seconds": self.generate_seconds,
            "rollout/staleness_mean": sum(age * count for age, count in self.ages.items()) / max(1, num_samples),
            "rollout/staleness_max": float(max(self.ages, default=0)),
            "rollout/num_regenerated": float(self.num_regenerated),
            "rollout/num_mixed": float(self.num_mixed),
            "rollout/queue_length": float(self.queue_length),
        }


def ages_of(samples: Iterable[Sample], newest: int, lineage: Lineage) -> Counter[int]:
    """Returns the number of samples by staleness. All must descend from the lineage, as `take` makes sure."""
    return Counter(age for sample in samples if (age := staleness_of(sample, newest, lineage)) is not None)


def over_ranks(reports: Sequence[BatchReport]) -> BatchReport:
    """Returns the report of one generation batch from those of the ranks, which worked at the same time."""
    return _summed(
        reports, max,
        wait_seconds=max(report.wait_seconds for report in reports),
        generate_seconds=max(report.generate_seconds for report in reports),
        queue_length=min(report.queue_length for report in reports),
    )  # fmt: skip


def over_batches(reports: Sequence[BatchReport]) -> BatchReport:
    """Returns the report of several generation batches of one optimizer step, one after the other."""
    return _summed(
        reports, add,
        wait_seconds=sum(report.wait_seconds for report in reports),
        generate_seconds=sum(report.generate_seconds for report in reports),
        queue_length=reports[-1].queue_length,
    )  # fmt: skip


def _summed(
    reports: Sequence[BatchReport], join_seconds: Callable[[float, float], float], **others: Any
) -> BatchReport:
    """Returns the sums. `join_seconds` joins a replica's seconds: those of ranks are at the same time."""
    ages: Counter[int] = Counter()
    made_by: Counter[int] = Counter()
    replicas: dict[str, tuple[int, float]] = {}
    for report in reports:
        ages.update(report.ages)
        made_by.update(report.made_by)
        for name, (num_samples, seconds) in report.replicas.items():
            before = replicas.get(name, (0, 0.0))
            replicas[name] = (before[0] + num_samples, join_seconds(before[1], seconds))
    return BatchReport(
        ages=dict(ages), made_by=dict(made_by), replicas=replicas,
        num_regenerated=sum(report.num_regenerated for report in reports),
        num_mixed=sum(report.num_mixed for report in reports),
        **others,
    )  # fmt: skip


def record_of(
    report: BatchReport, groups: Sequence[Group], global_step: int, metrics: Mapping[str, Sequence[float]]
) -> SamplesRecord:
    """Returns the record of an optimizer step. `metrics`: what TRL has logged of the step so far."""
    own = report.metrics

    def spread(name: str) -> Spread:
        parts = (metrics.get(f"sampling/{name}/{part}") for part in ("mean", "min", "max"))
        return Spread(*(values[-1] if values else None for values in parts))

    return SamplesRecord(
        global_step=global_step,
        staleness=Spread(mean=own["rollout/staleness_mean"], max=own["rollout/staleness_max"]),
        wait_seconds=report.wait_seconds, generate_seconds=report.generate_seconds,
        num_regenerated=report.num_regenerated, num_mixed=report.num_mixed, queue_length=report.queue_length,
        made_by=report.made_by,
        replicas={name: ReplicaWork(num_samples, seconds) for name, (num_samples, seconds) in report.replicas.items()},
        ratio=spread("importance_sampling_ratio"), logp_difference=spread("sampling_logp_difference"),
        groups=tuple(groups),
    )  # fmt: skip
