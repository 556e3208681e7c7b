"""Markdown pages of a chain for the Prefect UI: its lineage, and the results of upkeep. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightline.chain.upkeep.verify import VerifyReport
from weightline.lineage.edges import Shortcut
from weightline.lineage.graph import MAX_NODES, mermaid_graph
from weightline.lineage.rows import LineageRow
from weightline.lineage.table import markdown_table
from weightline.lineage.text import escape_markdown, escape_markdown_url

_MAX_FINDINGS = 20


def lineage_markdown(
    chain_url: str,
    rows: Sequence[LineageRow],
    max_versions: int = MAX_NODES,
    shortcuts: Iterable[Shortcut] = (),
) -> str:
    """Returns the page of a chain: graph and table of its newest versions. `rows` may leave out older versions.

    `max_versions` bounds its size for chains of any length.
    """
    name = f"Chain {escape_markdown_url(chain_url)}"
    if not rows:
        return f"{name} holds no version yet.\n"
    shown = rows[-max_versions:]
    intro = f"{name}: newest {len(shown)} of {shown[-1].version + 1} versions. `*`: a milestone, always evaluated."
    return f"{intro}\n\n```mermaid\n{mermaid_graph(shown, max_versions, shortcuts)}\n```\n\n{markdown_table(shown)}\n"


@dataclass(frozen=True, slots=True)
class UpkeepResult:
    """One step of upkeep, and its result in one sentence."""

    verb: str
    text: str


def upkeep_markdown(chain: str, results: Sequence[UpkeepResult]) -> str:
    """Returns the page of a chain's upkeep: a table with one row for each verb."""
    rows = [f"| {escape_markdown(one.verb)} | {escape_markdown(one.text)} |" for one in results]
    return "\n".join([f"Chain {escape_markdown_url(chain)}", "", "| step | result |", "| --- | --- |", *rows, ""])


def findings_text(report: VerifyReport) -> str:
    """Returns the first 20 findings of a check, one on each line, and the number of further ones."""
    lines = [f"{found.rule}: {found.subject}: {found.message}" for found in report.findings[:_MAX_FINDINGS]]
    others = len(report.findings) - len(lines)
    return "\n".join([*lines, *([f"and {others} more: weightline verify lists them"] if others else [])])
