"""The headers that say which versions may answer."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from weightline.errors import InputError
from weightline.front.demand import Demand, parse_demand


def test_a_request_without_headers_takes_any_version_that_is_served() -> None:
    demand = parse_demand(Headers({}))
    assert demand == Demand()
    assert demand.is_met_by(0)
    assert not demand.is_met_by(None)


def test_least_and_pinned_versions() -> None:
    least = parse_demand(Headers({"x-weightline-min-version": "3", "x-weightline-wait-seconds": "2.5"}))
    assert least == Demand(least=3, wait_seconds=2.5)
    assert [least.is_met_by(version) for version in (2, 3, 4)] == [False, True, True]
    pinned = parse_demand(Headers({"x-weightline-version": "3"}))
    assert [pinned.is_met_by(version) for version in (2, 3, 4)] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-weightline-min-version", "-1"),
        ("x-weightline-min-version", "1.5"),
        ("x-weightline-min-version", ""),
        ("x-weightline-version", "newest"),
        ("x-weightline-version", "9" * 30),
        ("x-weightline-wait-seconds", "nan"),
        ("x-weightline-wait-seconds", "-1"),
        ("x-weightline-wait-seconds", "601"),
        ("x-weightline-wait-seconds", "soon"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(InputError, match=name) as caught:
        parse_demand(Headers({name: value}))
    assert caught.value.field == name
