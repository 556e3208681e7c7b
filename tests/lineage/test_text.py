"""Names from manifests are whatever a writer put there: they must not become markup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.lineage.text import (
    escape_markdown,
    escape_mermaid,
    format_nbytes,
    format_percent,
    format_time,
    shorten,
)

HOSTILE = '"]:::x --> y["<script>alert(1)</script>`|end#quot;\n%%{init}%%\\'


@given(st.text(max_size=200))
def test_a_mermaid_label_holds_no_character_that_could_end_it(text: str) -> None:
    escaped = escape_mermaid(text)
    without_entities = re.sub(r"#\d+;", "", escaped)
    assert re.fullmatch(r"[A-Za-z0-9 .,%+_/()=-]*", without_entities)


def test_a_mermaid_entity_gives_back_the_character() -> None:
    escaped = escape_mermaid('a"b#c')
    assert escaped == "a#34;b#35;c"
    assert re.sub(r"#(\d+);", lambda found: chr(int(found[1])), escaped) == 'a"b#c'


@given(st.text(max_size=200))
def test_a_markdown_cell_stays_one_cell_without_html(text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert "<" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*\|", escaped)


def test_hostile_names_are_harmless() -> None:
    assert "<script>" not in escape_markdown(HOSTILE)
    assert '"' not in escape_mermaid(HOSTILE)
    assert escape_markdown("plain-name_1") == r"plain\-name\_1"


def test_long_names_are_cut() -> None:
    assert len(shorten("x" * 500)) == 60
    assert shorten("a\tb\n c") == "a b c"


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (51_234, "51.2 kB"), (2_500_000, "2.5 MB"), (7 * 10**12, "7.0 TB")]
)
def test_bytes_are_told_in_powers_of_1000(nbytes: int, text: str) -> None:
    assert format_nbytes(nbytes) == text


def test_fractions_and_times() -> None:
    assert format_percent(0.00671) == "0.67 %"
    assert format_time("2026-11-24T06:49:36.123Z") == "06:49:36"
    assert format_time(None) == "-"
