"""Who moves when: one first, then a few at a time, never all at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.errors import InputError
from weightline.fleet.waves import Member, WavePlan, plan_waves

members = st.lists(
    st.builds(Member, st.text("abcdef", min_size=1, max_size=4), st.none() | st.integers(0, 9)),
    unique_by=lambda member: member.name,
    max_size=12,
)


@given(members, st.integers(0, 9), st.integers(1, 5), st.booleans())
def test_everybody_is_in_one_place_and_the_first_wave_is_one(
    fleet: list[Member], version: int, wave_size: int, allow_backward: bool
) -> None:
    plan = plan_waves(fleet, version, wave_size=wave_size, allow_backward=allow_backward)
    named = [name for wave in plan.waves for name in wave]
    assert sorted([*named, *plan.settled]) == sorted(member.name for member in fleet)
    assert [len(wave) for wave in plan.waves[:1]] in ([], [1])
    assert all(len(wave) <= wave_size for wave in plan.waves[1:])
    assert len(named) < 2 or len(plan.waves) > 1
    at = {member.name: member.version for member in fleet}
    for name in plan.settled:
        assert at[name] == version if allow_backward else (at[name] is not None and at[name] >= version)
    if plan.canary is not None and any(at[name] is not None for name in named):
        assert at[plan.canary] is not None, "a canary without a version has none to go back to"


def test_the_one_furthest_behind_goes_first_unless_one_is_named() -> None:
    fleet = [Member("a", 3), Member("b", 1), Member("c", None), Member("d", 5), Member("e", 3)]
    assert plan_waves(fleet, 5, wave_size=2) == WavePlan((("b",), ("a", "c"), ("e",)), ("d",))
    assert plan_waves(fleet, 5, wave_size=9, canary="e").waves == (("e",), ("a", "b", "c"))
    with pytest.raises(InputError, match="no replica 'x' can be moved from here: name one of a, b, c, d, e"):
        plan_waves(fleet, 5, wave_size=2, canary="x")
    assert plan_waves(fleet, 5, wave_size=2, canary="d").canary == "b"
    with pytest.raises(InputError, match="wave_size is 0"):
        plan_waves(fleet, 5, wave_size=0)


def test_going_back_is_for_those_who_are_elsewhere() -> None:
    fleet = [Member("a", 3), Member("b", 1), Member("c", 2)]
    assert plan_waves(fleet, 2, wave_size=4).waves == (("b",),)
    assert plan_waves(fleet, 2, wave_size=4, allow_backward=True) == WavePlan((("b",), ("a",)), ("c",))
