"""What crashed writers leave in a folder, and what gc says of a chain that does not hold."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.chains import commit_state, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.read.refs import move_ref
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.errors import VersionNotFoundError
from weightline.format import keys
from weightline.store.local import LocalStore
from weightline.store.memory import MemoryStore


def test_what_killed_writers_staged_is_collected_when_it_is_old(tmp_path: Path) -> None:
    chain = Chain(LocalStore(tmp_path))
    commit_state(chain, random_state(0))
    for name, age_seconds in (("stale", 2 * 86400), ("under-way", 60)):
        path = tmp_path / ".staging" / name
        path.write_bytes(b"half a payload")
        os.utime(path, (time.time() - age_seconds,) * 2)
    plan = plan_gc(view_chain(chain), now=datetime.now(UTC))
    assert [info.key for info in plan.objects] == [".staging/stale"]
    collect(chain, plan)
    assert [path.name for path in (tmp_path / ".staging").iterdir()] == ["under-way"]
    at_once = plan_gc(view_chain(chain), now=datetime.now(UTC), grace=timedelta(0))
    assert [info.key for info in at_once.staged] == [".staging/under-way"]


def test_nothing_is_collected_where_a_ref_leads_nowhere() -> None:
    chain = Chain(MemoryStore())
    state = random_state(0)
    commit_state(chain, state)
    commit_state(chain, nudged(state, 1), state)
    move_ref(chain, "keep", 1)
    chain.store.delete(keys.commit(0))
    with pytest.raises(VersionNotFoundError):
        view_chain(chain)
