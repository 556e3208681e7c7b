"""Versions as lines of text for people: the rows of `weightline log`, and the page of `weightline show`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from weightline.cli.output import percent, printable, table
from weightline.format.manifest import Manifest
from weightline.lineage.listing import ListedVersion, Record
from weightline.lineage.text import format_nbytes

LOG_HEADER = ("version", "kind", "stage", "step", "changed", "bytes", "of full", "score", "refs", "committed")
_FACTS = ("run_id", "kind", "stage", "global_step", "created_at", "commit_id", "coding", "world_size")
_RELATIONS = ("base_version", "reverts_to", "is_milestone")
_EVALUATION = ("name", "status", "score", "num_problems", "seconds", "recorded_at", "reason")
_LOGGED = ("name", "recorded_at")
_REFRESH = ("name", "status", "served_at", "pause_seconds", "num_changed", "newer_version", "reason")


def log_lines(listed: Sequence[ListedVersion], staleness: Mapping[int, tuple[float, float]]) -> list[str]:
    """Returns the table of `weightline log`, with a column for staleness (mean, max by version) if there is any."""
    if not staleness:
        return table(LOG_HEADER, [log_cells(one) for one in listed])
    ages = [", ".join(map(cell, staleness.get(one.row.version, ()))) or "-" for one in listed]
    rows = [(*log_cells(one), age) for one, age in zip(listed, ages, strict=True)]
    return table((*LOG_HEADER, "staleness"), rows)


def log_cells(listed: ListedVersion) -> tuple[object, ...]:
    """Returns the row of a version in `weightline log`, one cell for each name of LOG_HEADER."""
    manifest, row = listed.manifest, listed.row
    score = cell(row.score) if row.score is not None else "-" if row.evaluation == "waiting" else cell(row.evaluation)
    return (
        manifest.version, manifest.kind, printable(manifest.stage, 30), manifest.global_step,
        percent(manifest.num_changed, manifest.num_elements), format_nbytes(manifest.payload_nbytes),
        percent(manifest.payload_nbytes, manifest.full_nbytes), score, ", ".join(listed.refs) or "-",
        _moment(manifest.created_at),
    )  # fmt: skip


def version_lines(
    manifest: Manifest,
    refs: Sequence[str],
    evaluations: Sequence[Record],
    refreshes: Sequence[Record],
    logged: Sequence[Record],
) -> list[str]:
    """Returns the page of a version: its facts, then one table for each kind of thing that it has."""
    lines = list(_facts(manifest, refs))
    tables = (
        _pairs("metric", manifest.metrics),
        _pairs("provenance", manifest.provenance),
        _records("evaluation", evaluations, _EVALUATION),
        _records("replica", refreshes, _REFRESH),
        _records("logged later", logged, _LOGGED),
        table(("payload", "rank", "bytes"), [(p.key, p.rank, format_nbytes(p.nbytes)) for p in manifest.payloads]),
        table(("file", "bytes", "sha256"), [(a.name, format_nbytes(a.nbytes), a.sha256) for a in manifest.assets]),
        table(
            ("tensor", "dtype", "shape", "digest"),
            [(n, t.dtype, "x".join(map(str, t.shape)) or "scalar", t.digest) for n, t in manifest.tensors.items()],
        ),
    )
    for rows in tables:
        if len(rows) > 1:
            lines += ["", *rows]
    return lines


def cell(value: object) -> str:
    """Returns a value of a manifest or record as text: never as Python spells it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {cell(held)}" for name, held in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(cell(one) for one in value) or "-"
    return str(value)


def _facts(manifest: Manifest, refs: Sequence[str]) -> Iterable[str]:
    document = manifest.model_dump(include={*_FACTS, *_RELATIONS})
    facts: dict[str, object] = {"version": manifest.version}
    facts |= {name: document[name] for name in _FACTS}
    facts |= {name: document[name] for name in _RELATIONS if document[name] not in (None, False)}
    if manifest.forked_from is not None:
        facts["forked_from"] = f"version {manifest.forked_from.version} of {manifest.forked_from.chain}"
    if manifest.base_model is not None:
        facts["base_model"] = manifest.base_model.model_dump()
    facts["changed"] = (
        f"{percent(manifest.num_changed, manifest.num_elements)} "
        f"({manifest.num_changed} of {manifest.num_elements} elements)"
    )
    facts["bytes"] = f"{format_nbytes(manifest.payload_nbytes)} of {format_nbytes(manifest.full_nbytes)}"
    facts["refs"] = ", ".join(refs) or "-"
    return (f"{name.replace('_', ' '):<13} {printable(cell(value), 1000)}" for name, value in facts.items())


def _pairs(name: str, values: Mapping[str, Any]) -> list[str]:
    return table((name, "value"), [(key, cell(value)) for key, value in values.items()])


def _records(what: str, records: Sequence[Record], names: Sequence[str]) -> list[str]:
    """Returns a table of records, without the columns that none of them has; a mapping gets a column for each name."""
    flat = [dict(record) for record in records]
    for record in flat:
        for name, value in (record.get("metrics") or {}).items() if isinstance(record.get("metrics"), Mapping) else ():
            record.setdefault(str(name), value)
    metrics = dict.fromkeys(
        str(name) for record in records if isinstance(record.get("metrics"), Mapping) for name in record["metrics"]
    )
    columns = [name for name in (*names, *metrics) if any(record.get(name) is not None for record in flat)]
    header = [what if name == "name" else name.replace("_", " ") for name in columns]
    return table(header, [[cell(record.get(name)) for name in columns] for record in flat])


def _moment(stamp: str) -> str:
    """Returns a stamp to the second, as in 2026-11-24 06:49:36; any other text as it is, cut."""
    return f"{stamp[:10]} {stamp[11:19]}" if stamp[10:11] == "T" and len(stamp) >= 19 else printable(stamp, 24)
