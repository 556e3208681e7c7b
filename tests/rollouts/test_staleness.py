"""The age of versions along a lineage with reverts, against a walk through the whole history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.errors import InputError
from weightline.rollouts.sample import Sample, Span
from weightline.rollouts.staleness import Lineage, StalenessRule, staleness_of


@st.composite
def histories(draw: st.DrawFn) -> tuple[Lineage, list[int | None], int]:
    """A lineage, the parent of each version (a revert's is that of the version it stands for), and the newest one."""
    lineage, parents = Lineage(), [None]
    alive = [0]
    """The ancestors of the newest version and itself, newest last; a revert stands beside the version it reverts to."""
    for _ in range(draw(st.integers(0, 12))):
        version = len(parents)
        if draw(st.integers(0, 3)) == 0:
            stands_for = draw(st.sampled_from(alive))
            parents.append(parents[stands_for])
            alive = [*(one for one in alive if one <= stands_for), version]
            lineage = lineage.started_at(version, stands_for)
        else:
            parents.append(version - 1)
            alive.append(version)
    return lineage, parents, len(parents) - 1


def _walked(parents: list[int | None], lineage: Lineage, version: int, newest: int) -> int | None:
    """The number of steps from the newest version to one that holds the weights of `version`, by walking."""
    same = dict(lineage.reverts)
    at, steps = newest, 0
    while True:
        holders = {at}
        while at in same:
            at = same[at]
            holders.add(at)
        if version in holders:
            return steps
        if parents[at] is None:
            return None
        at, steps = parents[at], steps + 1  # type: ignore[assignment]


@given(histories())
def test_the_age_is_the_number_of_steps_back(history: tuple[Lineage, list[int | None], int]) -> None:
    lineage, parents, newest = history
    for version in range(newest + 3):
        expected = None if version > newest else _walked(parents, lineage, version, newest)
        assert lineage.age(version, newest) == expected, (lineage, version, newest)


@given(histories(), st.integers(0, 4))
def test_what_the_rule_asks_for_is_fresh(history: tuple[Lineage, list[int | None], int], staleness: int) -> None:
    lineage, _, newest = history
    rule = StalenessRule(1, staleness)
    asked = rule.min_version(newest, lineage)
    for version in range(asked, newest + 1):
        assert rule.is_fresh(_sample(version), newest, lineage)
    assert asked >= lineage.start_version


def test_a_version_that_was_reverted_away_is_never_fresh() -> None:
    lineage = Lineage(0).started_at(5, stands_for=2)
    assert [lineage.age(version, 6) for version in range(7)] == [3, 2, 1, None, None, 1, 0]
    rule = StalenessRule(1, 100)
    assert not rule.is_fresh(_sample(4), 6, lineage)
    assert not rule.is_fresh(_sample(2, 4), 6, lineage)
    assert rule.is_fresh(_sample(2, 5), 6, lineage)
    assert rule.min_version(6, lineage) == 5


def test_the_oldest_version_of_a_sample_counts() -> None:
    assert staleness_of(_sample(5, 3, 4), 6, Lineage()) == 3
    assert staleness_of(Sample((1,), (), (), ()), 6, Lineage()) == 0
    assert staleness_of(_sample(7), 6, Lineage()) is None


def test_a_second_revert_to_the_same_version_hides_the_first() -> None:
    lineage = Lineage().started_at(4, stands_for=1).started_at(6, stands_for=1)
    assert [lineage.age(version, 7) for version in range(8)] == [2, 1, None, None, None, None, 1, 0]


def test_a_start_without_a_revert_continues_the_line() -> None:
    lineage = Lineage().started_at(4, stands_for=1).started_at(9)
    assert lineage.start_version == 9
    assert [lineage.age(version, 9) for version in (1, 2, 3, 4, 8)] == [5, None, None, 5, 1]


def test_json_gives_back_the_lineage() -> None:
    lineage = Lineage().started_at(4, stands_for=1).started_at(6, stands_for=4)
    assert Lineage.from_json(lineage.to_json()) == lineage
    for wrong in (
        {},
        {"start_version": "4", "reverts": []},
        {"start_version": 4, "reverts": [[1]]},
        {"start_version": 4},
    ):
        with pytest.raises(InputError):
            Lineage.from_json(wrong)


@pytest.mark.parametrize("reverts", [((3, 3),), ((3, 4),), ((3, 1), (2, 0)), ((3, 1), (3, 0)), ((3, -1),)])
def test_reverts_that_no_history_has_are_refused(reverts: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError):
        Lineage(3, reverts)


@pytest.mark.parametrize("field", ["lookahead", "staleness"])
def test_the_rule_names_the_field_that_is_wrong(field: str) -> None:
    with pytest.raises(InputError, match=field):
        StalenessRule(**{"lookahead": 1, "staleness": 1, field: -1})


def _sample(*versions: int) -> Sample:
    spans = tuple(Span(version, 1) for version in versions)
    return Sample((1,), (2,) * len(spans), (-1.0,) * len(spans), spans)
