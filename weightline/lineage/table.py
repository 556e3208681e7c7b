"""Formats the rows as a table for a Markdown page or a terminal. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from weightline.lineage.rows import LineageRow
from weightline.lineage.text import escape_markdown, format_nbytes, format_percent, format_time

COLUMNS = ("version", "stage", "step", "kind", "changed", "bytes", "to full", "score", "served (UTC)")


def cells(row: LineageRow) -> tuple[str, ...]:
    """Returns the row as text, one cell per column of COLUMNS, not escaped."""
    score = row.evaluation if row.score is None else f"{row.score:.3f}"
    served = format_time(row.served_at) if row.served_at else row.serving
    return (
        f"v{row.version}" + (" *" if row.is_milestone else ""),
        row.stage,
        str(row.global_step),
        row.kind,
        format_percent(row.changed_fraction),
        format_nbytes(row.payload_nbytes),
        format_percent(row.ratio_to_full),
        score,
        served,
    )


def markdown_table(rows: Sequence[LineageRow]) -> str:
    """Returns a Markdown table, newest version first. Names from manifests are escaped."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(escape_markdown(cell) for cell in cells(row)) + " |" for row in reversed(rows)]
    return "\n".join(lines)
