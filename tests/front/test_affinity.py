"""Which replica a request goes to: by its prompt's beginning, and by the load."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightline.front.affinity import LOAD_FACTOR, PREFIX_CHARACTERS, PREFIX_TOKENS, first_with_room, key_of, ranked

NAMES = [f"replica-{number}" for number in range(5)]
SYSTEM = {"role": "system", "content": "You count."}
QUESTION = {"role": "user", "content": "Two and two?"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a" * PREFIX_CHARACTERS + "b"}, {"prompt": "a" * PREFIX_CHARACTERS + "c"}),
        ({"prompt": ["first", "second"]}, {"prompt": "first"}),
        ({"prompt": [1, 2, 3]}, {"token_ids": [1, 2, 3]}),
        ({"prompts": [[1, 2, 3], [4]]}, {"prompt": [[1, 2, 3]]}),
        ({"token_ids": list(range(PREFIX_TOKENS + 1))}, {"token_ids": list(range(PREFIX_TOKENS + 9))}),
        (
            {"messages": [SYSTEM, QUESTION]},
            {
                "messages": [
                    SYSTEM,
                    QUESTION,
                    {"role": "assistant", "content": "4"},
                    {"role": "user", "content": "Sure?"},
                ]
            },
        ),
        ({"prompt": "a"}, {"prompt": "a", "temperature": 0.5, "seed": 7}),
    ],
)
def test_requests_that_begin_alike_have_one_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key_of(one) == key_of(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"prompt": "a"}, {"prompt": "b"}),
        ({"prompt": [1, 2]}, {"prompt": [1, 3]}),
        ({"prompt": "[1, 2]"}, {"prompt": [1, 2]}),
        ({"messages": [SYSTEM, QUESTION]}, {"messages": [SYSTEM, {"role": "user", "content": "Two and three?"}]}),
    ],
)
def test_requests_that_begin_otherwise_have_keys_of_their_own(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key_of(one) != key_of(other)


def test_a_client_may_name_its_key() -> None:
    assert key_of({"prompt": "a"}, "episode-7") == key_of({"prompt": "b"}, "episode-7") != key_of({"prompt": "a"})


@pytest.mark.parametrize("body", [None, [], 7, "text", {}, {"prompt": None}, {"prompt": []}, {"messages": 3}])
def test_a_body_without_a_prompt_has_the_empty_key(body: object) -> None:
    assert key_of(body) == ""


def test_a_replica_that_leaves_moves_its_own_keys_only() -> None:
    keys = [f"text:{number}" for number in range(1000)]
    homes = {key: ranked(key, NAMES)[0] for key in keys}
    assert sorted(set(homes.values())) == NAMES
    assert min(Counter(homes.values()).values()) > 120
    left = NAMES[1:]
    moved = {key for key in keys if ranked(key, left)[0] != homes[key]}
    assert moved == {key for key, home in homes.items() if home == NAMES[0]}
    assert all(ranked(key, left)[0] == ranked(key, NAMES)[1] for key in moved)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_the_first_with_room_is_never_above_the_bound(loads: list[int]) -> None:
    names = [f"r{number}" for number in range(len(loads))]
    chosen = first_with_room(names, dict(zip(names, loads, strict=True)))
    mean = (sum(loads) + 1) / len(loads)
    assert loads[names.index(chosen)] + 1 <= LOAD_FACTOR * mean + 1
    first_free = next(name for name, load in zip(names, loads, strict=True) if load < LOAD_FACTOR * mean)
    assert names.index(chosen) <= names.index(first_free)


def test_an_idle_home_gets_the_request_and_a_busy_one_does_not() -> None:
    assert first_with_room(["a", "b", "c"], {"a": 0, "b": 0, "c": 0}) == "a"
    assert first_with_room(["a", "b", "c"], {"a": 4, "b": 0, "c": 0}) == "b"
