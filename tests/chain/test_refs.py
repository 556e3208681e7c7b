"""Names for versions: what may be one, when it moves, and what stands for a version without being one."""

from __future__ import annotations

import pytest

from tests.chains import commit_state, copy_of, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.read.refs import history_of, move_ref, resolve
from weightline.errors import InputError, NotFoundError, VersionNotFoundError
from weightline.store.memory import MemoryStore


@pytest.fixture(scope="module")
def grown() -> MemoryStore:
    store, state = MemoryStore("memory://refs/toy"), random_state(0)
    commit_state(Chain(store), state)
    for seed in (1, 2):
        before, state = state, nudged(state, seed)
        commit_state(Chain(store), state, before)
    return store


@pytest.fixture
def chain(grown: MemoryStore) -> Chain:
    return Chain(copy_of(grown))


@pytest.mark.parametrize("name", ["tip", "nothing", "5", "007", "", ".x", "a/b", "\u00b2"])
def test_a_name_that_would_be_read_as_something_else_is_refused(chain: Chain, name: str) -> None:
    with pytest.raises(InputError):
        move_ref(chain, name, 1)
    assert list(chain.store.list("refs/")) == []


@pytest.mark.parametrize("name", ["best", "v1.0", "1e5", "0x10", "tip-of-monday"])
def test_a_name_resolves(chain: Chain, name: str) -> None:
    move_ref(chain, name, 1)
    assert resolve(chain, name) == 1


def test_what_stands_for_a_version_without_a_name(chain: Chain) -> None:
    assert [resolve(chain, text) for text in ("tip", "0", "01")] == [2, 0, 1]
    for text, error in {
        "\u00b2": InputError, "\u0661": InputError, "9": VersionNotFoundError, "9" * 20: VersionNotFoundError,
        "9" * 100: NotFoundError, "9" * 5000: InputError, "nothing": NotFoundError, "1 ": InputError,
    }.items():  # fmt: skip
        with pytest.raises(error):
            resolve(chain, text)


def test_a_ref_moves_and_a_repeated_move_changes_nothing(chain: Chain) -> None:
    for version in (1, 1, 2, 1, 1):
        move_ref(chain, "best", version)
    assert [ref.version for ref in history_of(chain, "best")] == [1, 2, 1]


def test_a_tag_never_moves_and_stays_a_tag(chain: Chain) -> None:
    first = move_ref(chain, "good", 1, is_tag=True)
    assert move_ref(chain, "good", 1, is_tag=True) == first
    for version, is_tag in ((2, True), (2, False), (1, False)):
        with pytest.raises(InputError, match="a tag never moves"):
            move_ref(chain, "good", version, is_tag=is_tag)
    assert history_of(chain, "good") == [first]


def test_a_ref_becomes_a_tag_where_it_stands(chain: Chain) -> None:
    move_ref(chain, "best", 1)
    with pytest.raises(InputError, match="at version 1"):
        move_ref(chain, "best", 2, is_tag=True)
    assert move_ref(chain, "best", 1, is_tag=True).is_tag
    with pytest.raises(InputError, match="a tag never moves"):
        move_ref(chain, "best", 2)
    assert [(ref.version, ref.is_tag) for ref in history_of(chain, "best")] == [(1, False), (1, True)]
