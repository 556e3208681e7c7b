"""The same rows as Markdown, as terminal cells and as summary.json."""

from __future__ import annotations

from tests.lineage.rows import row
from weightline.lineage.pages import lineage_markdown
from weightline.lineage.table import COLUMNS, cells, markdown_table


def test_cells_match_the_columns() -> None:
    told = dict(zip(COLUMNS, cells(row(3, is_milestone=True, evaluation="done", score=0.8125)), strict=True))
    assert told["version"] == "v3 *"
    assert (told["changed"], told["to full"], told["score"]) == ("1.00 %", "61.70 %", "0.812")
    assert told["served (UTC)"] == "waiting"


def test_a_skipped_evaluation_says_so_in_the_place_of_its_score() -> None:
    assert cells(row(1, evaluation="skipped"))[COLUMNS.index("score")] == "skipped"


def test_the_table_shows_the_newest_version_first_and_keeps_its_columns() -> None:
    lines = markdown_table([row(0), row(1, stage="a|b"), row(2)]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["v2", "v1", "v0"]
    assert r"a\|b" in lines[3]


def test_the_page_is_bounded_however_long_the_chain_is() -> None:
    rows = [row(version, stage="s" * 500, run_id="r" * 500) for version in range(5_000)]
    page = lineage_markdown("file:///bucket/chain", rows)
    assert len(page) < 20_000
    assert "newest 40 of 5000 versions" in page
    assert "```mermaid\ngraph TD" in page


def test_the_page_of_a_suffix_counts_the_versions_before_it() -> None:
    page = lineage_markdown("file:///bucket/chain", [row(98), row(99)])
    assert "newest 2 of 100 versions" in page
    assert "v0 ... v97" in page


def test_an_empty_chain_has_a_page() -> None:
    assert lineage_markdown("file:///x`y", []) == "Chain `file:///x'y` holds no version yet.\n"
