"""The mermaid graph: which nodes and edges it has, and that it stays readable."""

from __future__ import annotations

import re

from tests.lineage.rows import row
from weightline.lineage.graph import STAGE_COLORS, mermaid_graph


def _nodes(graph: str) -> dict[str, str]:
    return dict(re.findall(r"^    (v\d+)\W.*:::(stage\d+)$", graph, re.MULTILINE))


def test_stages_have_colours_of_their_own() -> None:
    rows = [row(0, kind="anchor"), row(1), row(2, stage="dpo"), row(3, stage="grpo")]
    graph = mermaid_graph(rows)
    assert graph.startswith("graph TD\n")
    assert _nodes(graph) == {"v0": "stage0", "v1": "stage0", "v2": "stage1", "v3": "stage2"}
    for index in range(3):
        assert f"classDef stage{index} fill:{STAGE_COLORS[index][0]}" in graph


def test_edges_follow_the_base_versions_and_reverts() -> None:
    rows = [row(0, kind="anchor"), row(1), row(2), row(3, kind="revert", reverts_to=1)]
    graph = mermaid_graph(rows)
    assert re.findall(r"v\d+ --> v\d+", graph) == ["v0 --> v1", "v1 --> v2", "v2 --> v3"]
    assert "v1 -. equals .-> v3" in graph


def test_anchors_and_milestones_have_shapes_of_their_own() -> None:
    graph = mermaid_graph([row(0, kind="anchor", is_milestone=True), row(1), row(2, is_milestone=True, score=0.5)])
    assert 'v0[("' in graph
    assert 'v1["' in graph
    assert 'v2{{"' in graph
    assert "score 0.500" in graph


def test_the_newest_versions_are_shown_and_the_others_counted_as_one_node() -> None:
    rows = [row(0, kind="anchor"), *(row(version) for version in range(1, 100))]
    graph = mermaid_graph(rows, max_nodes=10)
    assert sorted(_nodes(graph)) == [f"v{version}" for version in range(90, 100)]
    assert 'older(["v0 ... v89"])' in graph
    assert "older --> v90" in graph


def test_a_hostile_stage_name_stays_inside_its_label() -> None:
    hostile = '"]; click v0 "javascript:alert(1)" %% <img onerror=x>'
    graph = mermaid_graph([row(0, kind="anchor", stage=hostile)])
    (label,) = re.findall(r'^    v0\[\("(.*)"\)\]:::stage0$', graph, re.MULTILINE)
    assert '"' not in label
    assert "javascript:" not in label
    assert "<img" not in label


def test_more_stages_than_colours_start_over() -> None:
    graph = mermaid_graph([row(version, stage=f"stage-{version}") for version in range(len(STAGE_COLORS) + 1)])
    assert f"classDef stage{len(STAGE_COLORS)} fill:{STAGE_COLORS[0][0]}" in graph
