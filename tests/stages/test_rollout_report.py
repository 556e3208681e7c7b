"""Reports of samples over ranks and batches, as metrics and as the record beside a version."""

from __future__ import annotations

from dataclasses import replace

from weightline.rollouts.record import Group, parse_samples
from weightline.rollouts.sample import Sample, Span
from weightline.rollouts.staleness import Lineage
from weightline.stages.rollout_report import BatchReport, ages_of, over_batches, over_ranks, record_of

_FIRST = BatchReport(
    ages={0: 6, 1: 2}, made_by={4: 2, 5: 6}, replicas={"a": (8, 1.5)}, wait_seconds=1.0, generate_seconds=2.0,
    num_regenerated=1, num_mixed=0, queue_length=1,
)  # fmt: skip
_SECOND = BatchReport(
    ages={1: 4, 3: 4}, made_by={2: 4, 4: 4}, replicas={"a": (2, 0.5), "b": (6, 3.0)}, wait_seconds=0.25,
    generate_seconds=4.0, num_regenerated=2, num_mixed=3, queue_length=2,
)  # fmt: skip


def test_ranks_work_at_the_same_time_and_batches_one_after_the_other() -> None:
    ranks, batches = over_ranks([_FIRST, _SECOND]), over_batches([_FIRST, _SECOND])
    for both in (ranks, batches):
        assert both.ages == {0: 6, 1: 6, 3: 4}
        assert both.made_by == {2: 4, 4: 6, 5: 6}
        assert (both.num_regenerated, both.num_mixed) == (3, 3)
    assert ranks.replicas == {"a": (10, 1.5), "b": (6, 3.0)}
    assert batches.replicas == {"a": (10, 2.0), "b": (6, 3.0)}
    assert (ranks.wait_seconds, ranks.generate_seconds, ranks.queue_length) == (1.0, 4.0, 1)
    assert (batches.wait_seconds, batches.generate_seconds, batches.queue_length) == (1.25, 6.0, 2)


def test_metrics_are_of_all_samples() -> None:
    metrics = over_ranks([_FIRST, _SECOND]).metrics
    assert metrics["rollout/staleness_mean"] == (6 * 1 + 4 * 3) / 16
    assert metrics["rollout/staleness_max"] == 3
    assert metrics["rollout/wait_seconds"] == 1
    assert all(isinstance(value, float) for value in metrics.values())
    assert replace(_FIRST, ages={}).metrics["rollout/staleness_mean"] == 0


def test_ages_follow_the_lineage() -> None:
    lineage = Lineage().started_at(7, 4)
    samples = [
        Sample((1,), (2, 3), (-1.0, -1.0), spans)
        for spans in [(Span(8, 2),), (Span(7, 1), Span(8, 1)), (Span(4, 2),), (Span(3, 1), Span(4, 1))]
    ]
    assert ages_of(samples, 8, lineage) == {0: 1, 1: 2, 2: 1}


def test_the_record_has_what_was_logged_last() -> None:
    logged = {
        "sampling/importance_sampling_ratio/mean": [0.5, 1.0], "sampling/importance_sampling_ratio/min": [0.75],
        "sampling/importance_sampling_ratio/max": [1.25], "sampling/sampling_logp_difference/max": [0.125], "loss": [1],
    }  # fmt: skip
    found = parse_samples(record_of(_FIRST, [Group("1+1=")], 9, logged).to_record())
    assert (found.global_step, found.num_samples, found.num_regenerated, found.queue_length) == (9, 8, 1, 1)
    assert (found.ratio.mean, found.ratio.min, found.ratio.max) == (1.0, 0.75, 1.25)
    assert (found.logp_difference.mean, found.logp_difference.max) == (None, 0.125)
    assert (found.staleness.mean, found.staleness.max) == (0.25, 1)
    assert [group.prompt for group in found.groups] == ["1+1="]
