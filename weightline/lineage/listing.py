"""Versions of a chain with their scores and names, for people: `weightline log`, `show` and `expire --keep-best`.

A record that cannot be read is left out with a message: it must not hide the versions.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from weightline.chain import Chain
from weightline.chain.read.records import EVALUATIONS, LOGGED, read_record
from weightline.chain.read.refs import current_refs
from weightline.errors import CorruptError, InputError, NotFoundError
from weightline.format import keys
from weightline.format.manifest import Header
from weightline.lineage.rows import LineageRow, row_of, with_records
from weightline.lineage.text import slug

Record = Mapping[str, Any]
#: The metric that every evaluation record has.
SCORE = "score"
#: Characters.
_MAX_METRIC_IN_REF = 100


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one kind by version, and what is wrong with those that cannot be read."""

    of: Mapping[int, Sequence[Record]]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedVersion:
    """A version as a list shows it."""

    manifest: Header
    row: LineageRow
    refs: tuple[str, ...] = ()
    evaluations: tuple[Record, ...] = field(default=())


def list_versions(chain: Chain, versions: Sequence[int]) -> tuple[tuple[ListedVersion, ...], tuple[str, ...]]:
    """Returns (versions in the given order, problems of their records). VersionNotFoundError, CorruptError.

    A version that was collected since it was listed is left out.
    """
    if not versions:
        return (), ()
    evaluations, logged = (
        read_good_records(chain, kind, min(versions), max(versions)) for kind in (EVALUATIONS, LOGGED)
    )
    problems = [*evaluations.problems, *logged.problems]
    try:
        refs = refs_by_version(chain)
    except CorruptError as error:
        refs = {}
        problems.append(str(error))
    listed = []
    for version in versions:
        manifest = chain.header_if_kept(version)
        if manifest is None:
            continue
        found = tuple(evaluations.of.get(version, ()))
        row = with_records(row_of(manifest), found, (), logged.of.get(version, ()))
        listed.append(ListedVersion(manifest, row, refs.get(version, ()), found))
    return tuple(listed), tuple(problems)


def read_good_records(chain: Chain, kind: str, first: int, last: int) -> Records:
    """Returns the records of versions first..last. Records of other versions are not read."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    found: defaultdict[int, list[Record]] = defaultdict(list)
    problems = []
    for info in chain.store.list(prefix, f"{prefix}{keys.padded(first)}"):
        digits, _, file_name = info.key.removeprefix(prefix).partition("/")
        version = keys.version_of(digits)
        if version is None:
            continue
        if version > last:
            break
        try:
            record = read_record(chain, kind, version, file_name.removesuffix(".json"))
        except (CorruptError, InputError, NotFoundError) as error:
            problems.append(str(error))
            continue
        if record is not None:
            found[version].append(record)
    return Records(dict(found), tuple(problems))


def refs_by_version(chain: Chain) -> dict[int, tuple[str, ...]]:
    """Returns the names of every version that has some, sorted."""
    found: defaultdict[int, list[str]] = defaultdict(list)
    for ref in current_refs(chain).values():
        found[ref.version].append(ref.name)
    return {version: tuple(sorted(names)) for version, names in found.items()}


def number_of(listed: ListedVersion, metric: str) -> float | None:
    """Returns a version's value of a metric: the evaluation's, else the one that training logged; None without one."""
    for record in listed.evaluations:
        metrics = record.get("metrics")
        found = record.get(SCORE) if metric == SCORE else metrics.get(metric) if isinstance(metrics, Mapping) else None
        value = _finite(found)
        if record.get("status") == "done" and value is not None:
            return value
    return _finite(listed.row.metrics.get(metric))


def best_versions(
    listed: Iterable[ListedVersion], metric: str, num_best: int, *, is_lowest: bool = False
) -> list[tuple[int, float]]:
    """Returns (version, value) of the versions with the best values, best first; of equal ones the earlier version.

    InputError when no version has the metric.
    """
    everything = tuple(listed)
    valued = [(one.manifest.version, value) for one in everything if (value := number_of(one, metric)) is not None]
    if not valued:
        known = sorted({name for one in everything for name in _metric_names(one)})
        raise InputError(
            f"no version has the metric {metric!r}: known are {', '.join(known[:20]) or 'none'}", field="metric"
        )
    return sorted(valued, key=lambda one: (one[1] if is_lowest else -one[1], one[0]))[:num_best]


def best_prefix(metric: str) -> str:
    """Returns the refs' common part, `best-METRIC-`. No two metrics share one, however they are spelt."""
    if len(metric) <= _MAX_METRIC_IN_REF and keys.is_name(f"best-{metric}-1"):
        return f"best-{metric}-"
    spelling = hashlib.sha256(metric.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"best-{slug(metric)[:_MAX_METRIC_IN_REF]}-{spelling}-"


def _metric_names(listed: ListedVersion) -> set[str]:
    names = set(listed.row.metrics)
    for record in listed.evaluations:
        names |= {SCORE} if _finite(record.get(SCORE)) is not None else set()
        metrics = record.get("metrics")
        names |= {str(name) for name in metrics} if isinstance(metrics, Mapping) else set()
    return names


def _finite(value: object) -> float | None:
    """Returns a finite number as a float; None for any other value, an integer beyond all floats included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None
