"""Which versions a newer one has overtaken."""

from __future__ import annotations

import logging
import uuid

import pytest

from tests.chains import commit_state, nudged, random_state
from weightline.chain import Chain, open_chain
from weightline.chain.read.overtaken import Overtaken, find_overtaken
from weightline.errors import VersionNotFoundError
from weightline.format import keys


def _grown(runs: str, milestones: set[int] = frozenset()) -> Chain:  # type: ignore[assignment]
    """A chain with one version for each letter, which names the training that wrote it."""
    chain = open_chain(f"memory://{uuid.uuid4().hex}/toy")
    state = random_state(0)
    for version, run_id in enumerate(runs):
        moved = nudged(state, version)
        commit_state(chain, moved, state if version else None, run_id=run_id, is_milestone=version in milestones)
        state = moved
    return chain


def test_a_newer_version_of_the_training_overtakes_all_before_it() -> None:
    chain = _grown("aaaaa")
    assert find_overtaken(chain, 1) == Overtaken(4, (1, 2, 3))
    assert find_overtaken(chain, 3) == Overtaken(4, (3,))
    assert find_overtaken(chain, 4) is None


def test_milestones_are_not_overtaken() -> None:
    chain = _grown("aaaaaa", {0, 3})
    assert find_overtaken(chain, 1) == Overtaken(5, (1, 2, 4))
    assert find_overtaken(chain, 3) is None


def test_another_training_overtakes_nothing() -> None:
    chain = _grown("aabba")
    assert find_overtaken(chain, 2) is None
    assert find_overtaken(chain, 0) == Overtaken(4, (0, 1))


def test_nothing_before_the_version_is_read_and_a_broken_one_after_it_is_left(caplog: pytest.LogCaptureFixture) -> None:
    chain = _grown("aaaaa")
    for version in (0, 2):
        chain.store.put(keys.commit(version), b"nobody reads this")
    caplog.set_level(logging.WARNING, "weightline")
    assert find_overtaken(Chain(chain.store), 1) == Overtaken(4, (1, 3))
    assert "version 2 is left to its own request" in caplog.text


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(VersionNotFoundError):
        find_overtaken(_grown("a"), 7)
