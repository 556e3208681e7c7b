"""Draws a chain as a mermaid flowchart, top to bottom. Stages have colors; anchors and milestones have shapes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from weightline.lineage.edges import Shortcut, lineage_edges
from weightline.lineage.rows import LineageRow
from weightline.lineage.text import escape_mermaid, format_nbytes, format_percent

#: Fill, border and text color of the stages, in order of appearance. They are legible on light and on dark pages.
STAGE_COLORS = (
    ("#dbeafe", "#1d4ed8", "#172554"),
    ("#fef3c7", "#b45309", "#451a03"),
    ("#dcfce7", "#15803d", "#052e16"),
    ("#fae8ff", "#a21caf", "#4a044e"),
    ("#fee2e2", "#b91c1c", "#450a0a"),
    ("#cffafe", "#0e7490", "#083344"),
)
#: Number of nodes that can be viewed without scrolling.
MAX_NODES = 40

_ARROWS = {"delta": "-->", "equals": "-. equals .->", "shortcut": "-. shortcut .->"}


def mermaid_graph(rows: Sequence[LineageRow], max_nodes: int = MAX_NODES, shortcuts: Iterable[Shortcut] = ()) -> str:
    """Returns the graph of the newest `max_nodes` (1 or more) rows, oldest first. All earlier versions are one node."""
    shown = rows[-max_nodes:]
    stages = list(dict.fromkeys(row.stage for row in shown))
    class_of = {stage: f"stage{index}" for index, stage in enumerate(stages)}
    lines = ["graph TD", *_older(shown)]
    lines += [f"    {_node(row)}:::{class_of[row.stage]}" for row in shown]
    lines += _edges(shown, shortcuts)
    lines += [_class_definition(class_of[stage], index) for index, stage in enumerate(stages)]
    return "\n".join(lines)


def _older(shown: Sequence[LineageRow]) -> Iterator[str]:
    if shown and shown[0].version > 0:
        yield f'    older(["v0 ... v{shown[0].version - 1}"])'
        yield f"    older --> v{shown[0].version}"


def _node(row: LineageRow) -> str:
    opening, closing = ("[(", ")]") if row.kind == "anchor" else ("{{", "}}") if row.is_milestone else ("[", "]")
    return f'v{row.version}{opening}"{"<br/>".join(_label(row))}"{closing}'


def _label(row: LineageRow) -> Iterator[str]:
    kind = "" if row.kind == "delta" else f" {row.kind}"
    yield f"v{row.version} {escape_mermaid(row.stage)}{kind}, step {row.global_step}"
    amount = format_nbytes(row.payload_nbytes)
    yield amount if row.kind == "anchor" else f"{format_percent(row.changed_fraction)} changed, {amount}"
    if row.score is not None:
        yield f"score {row.score:.3f}"


def _edges(shown: Sequence[LineageRow], shortcuts: Iterable[Shortcut]) -> Iterator[str]:
    versions = {row.version for row in shown}
    for edge in lineage_edges(shown, shortcuts):
        if edge.source in versions:
            yield f"    v{edge.source} {_ARROWS[edge.kind]} v{edge.target}"


def _class_definition(name: str, index: int) -> str:
    fill, border, text = STAGE_COLORS[index % len(STAGE_COLORS)]
    return f"    classDef {name} fill:{fill},stroke:{border},color:{text}"
