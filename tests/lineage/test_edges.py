"""How versions hang together, for every drawing of them."""

from __future__ import annotations

from tests.lineage.rows import row
from weightline.lineage.edges import Edge, anchored_versions, lineage_edges
from weightline.lineage.graph import mermaid_graph

ROWS = [row(0, kind="anchor"), row(1), row(2), row(3, kind="revert", reverts_to=1)]
SHORTCUTS = [(0, 2), (None, 2), (1, 9)]


def test_every_edge_ends_at_a_row() -> None:
    assert lineage_edges(ROWS, SHORTCUTS) == (
        Edge("delta", 0, 1),
        Edge("delta", 1, 2),
        Edge("shortcut", 0, 2),
        Edge("delta", 2, 3),
        Edge("equals", 1, 3),
    )


def test_an_edge_may_come_from_before_the_rows() -> None:
    assert lineage_edges(ROWS[3:]) == (Edge("delta", 2, 3), Edge("equals", 1, 3))


def test_an_anchor_written_later_is_no_edge() -> None:
    assert anchored_versions(SHORTCUTS) == {2}


def test_the_mermaid_graph_has_the_shortcuts() -> None:
    graph = mermaid_graph(ROWS, shortcuts=SHORTCUTS)
    assert "v0 -. shortcut .-> v2" in graph
    assert "v9" not in graph
