"""Reads the records of the samples that versions were trained on, and draws one for a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable

from weightline.chain import Chain
from weightline.chain.read.records import SAMPLES
from weightline.lineage.listing import read_good_records
from weightline.lineage.rows import LineageRow
from weightline.lineage.text import escape_markdown
from weightline.rollouts.record import SamplesRecord, Spread, parse_samples


def read_samples(chain: Chain, version: int) -> tuple[SamplesRecord | None, tuple[str, ...]]:
    """Returns (the record of the version's last step, None without one; what is wrong with unreadable ones)."""
    records = read_good_records(chain, SAMPLES, version, version)
    found = [parse_samples(record) for record in records.of.get(version, ())]
    return max(found, key=lambda one: one.global_step, default=None), records.problems


def newest_samples(chain: Chain, versions: Iterable[int]) -> tuple[int, SamplesRecord] | None:
    """Returns (version, its record) of the first of the versions that has a record; None if none has."""
    for version in versions:
        found, _ = read_samples(chain, version)
        if found is not None:
            return version, found
    return None


def staleness_by_version(
    chain: Chain, rows: Iterable[LineageRow], max_read: int = 100
) -> tuple[dict[int, tuple[float, float]], tuple[str, ...]]:
    """Returns ((mean, max) by version, what is wrong with unreadable records).

    The metric of a version says it. Where none was logged, since trainers log every few steps, the record does. At most
    `max_read` versions are looked up so.
    """
    found: dict[int, tuple[float, float]] = {}
    unknown = []
    for row in rows:
        if row.staleness is not None:
            found[row.version] = row.staleness
        else:
            unknown.append(row.version)
    if not unknown or max(unknown) - min(unknown) >= max_read:
        return found, ()
    records = read_good_records(chain, SAMPLES, min(unknown), max(unknown))
    for version in unknown:
        for record in records.of.get(version, ()):
            staleness = parse_samples(record).staleness
            if staleness.mean is not None and staleness.max is not None:
                found[version] = (staleness.mean, staleness.max)
    return found, records.problems


def samples_markdown(version: int, found: SamplesRecord) -> str:
    """Returns a sentence about the samples of a version, and a table of the replicas that generated them. Pure."""
    parts = [f"v{version} was trained on {found.num_samples} samples"]
    if found.made_by:
        made_by = ", ".join(f"v{by} ({num_samples})" for by, num_samples in found.made_by.items())
        parts.append(f"made by {made_by}")
    parts += [f"{name} {text}" for name, text in (
        ("staleness", _spread(found.staleness)), ("ratio", _spread(found.ratio)),
        ("log probabilities differ by", _spread(found.logp_difference)),
    ) if text]  # fmt: skip
    if found.wait_seconds is not None:
        parts.append(f"training waited {found.wait_seconds:.2f} s")
    if found.queue_length is not None:
        parts.append(f"{found.queue_length} batches queued")
    sentence = "; ".join(parts) + "."
    if not found.replicas:
        return sentence
    work = (
        (escape_markdown(name), str(done.num_samples), _number(done.seconds), _number(done.samples_per_second))
        for name, done in found.replicas.items()
    )
    rows = [f"| {' | '.join(cells)} |" for cells in work]
    return "\n".join([sentence, "", "| replica | samples | seconds | samples/s |", "| --- |" + " ---: |" * 3, *rows])


def _spread(spread: Spread) -> str:
    found = [(name, getattr(spread, name)) for name in ("mean", "min", "max")]
    return ", ".join(f"{name} {value:.4g}" for name, value in found if value is not None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
