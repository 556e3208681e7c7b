"""What a run came to: summary.json, and the same as a table for the terminal. Reads the bucket and the run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from weightline.lineage.rows import LineageRow
from weightline.lineage.table import COLUMNS, cells, summary_rows
from weightline.runs.folder import Run
from weightline.stages.job import StageResult, write_atomically


def write_summary(run: Run, rows: Sequence[LineageRow], ui_url: str, seconds: float) -> dict[str, Any]:
    """Write summary.json in one rename and return what it says. Safe to repeat."""
    start = next((row.score for row in rows if row.version == 0), None)
    summary = {
        "run_id": run.run_id,
        "chain": run.chain_url,
        "recipe": run.recipe.model_dump(mode="json"),
        "device": run.placement.device,
        "num_processes": run.placement.num_processes,
        "prefect_ui": ui_url,
        "seconds": round(seconds, 1),
        "start_score": start,
        "stages": {stage.kind: _stage_facts(run, stage.kind, rows) for stage in run.recipe.stages},
        "versions": summary_rows(rows),
    }
    write_atomically(run.summary_path, json.dumps(summary, indent=1))
    return summary


def _stage_facts(run: Run, kind: str, rows: Sequence[LineageRow]) -> dict[str, Any]:
    result = StageResult.load(run.job(kind))
    proof = _read(run.equality_path(kind))
    last = next((row for row in reversed(rows) if row.version == proof.get("version")), None)
    return {
        "last_version": proof.get("version"),
        "is_bit_equal": proof.get("is_bit_equal", False),
        "score": last.score if last else None,
        "global_step": result.global_step if result else None,
        "train_seconds": round(result.train_seconds, 1) if result else None,
        "metrics": result.metrics if result else {},
    }


def versions_table(rows: Sequence[LineageRow], title: str) -> Table:
    """Oldest version first."""
    table = Table(title=title, title_justify="left", caption="* milestone", caption_justify="left", box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("version", "stage", "kind") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    return table


def stage_lines(summary: dict[str, Any]) -> list[str]:
    """One line a stage: that its bits are the chain's, and what it scored."""
    lines = [f"start: score {_score(summary['start_score'])}"]
    for kind, facts in summary["stages"].items():
        equal = "bit-equal" if facts["is_bit_equal"] else "NOT proved equal"
        version = f"version {facts['last_version']}, replayed from the bucket,"
        lines.append(f"{kind}: score {_score(facts['score'])}; {version} is {equal} to what trainer.save_model wrote")
    return lines


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return told
