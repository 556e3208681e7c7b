"""Leases: who is alive, by which clock, and what garbage collection leaves alone for them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.chains import AT_ONCE, commit_state, later, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.read.leases import Lease, live_leases, read_lease, read_leases, write_lease
from weightline.chain.replay.state import read_state
from weightline.chain.upkeep.gc import collect, plan_gc, view_chain
from weightline.chain.upkeep.retention import expire_before, leased_versions
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import InputError, VersionNotFoundError
from weightline.format import keys
from weightline.store.memory import MemoryStore


@pytest.fixture
def chain() -> Chain:
    """Versions 0 to 6."""
    made = Chain(MemoryStore())
    state = random_state(0)
    commit_state(made, state)
    for seed in range(6):
        before, state = state, nudged(state, seed)
        commit_state(made, state, before)
    return made


def make_lease(replica: str, version: int | None, *, expires_in: float = 60.0, **fields: Any) -> Lease:
    now = datetime.now(UTC)
    told: dict[str, Any] = {
        "replica": replica, "holder": "h", "engine": "transformers", "host": "here", "pid": 7, "release": "0",
        "state": "serving", "version": version, "renewed_at": now.isoformat(), "ttl_seconds": 60.0,
        "expires_at": (now + timedelta(seconds=expires_in)).isoformat(),
    }  # fmt: skip
    return Lease.model_validate(told | fields)


def test_a_lease_is_renewed_in_place_and_ends(chain: Chain) -> None:
    write_lease(chain, make_lease("a", 1))
    write_lease(chain, make_lease("b", 2))
    write_lease(chain, make_lease("a", 3))
    assert [(lease.replica, lease.version) for lease in live_leases(chain)] == [("a", 3), ("b", 2)]
    write_lease(chain, make_lease("b", 2, state="ended"))
    assert [lease.replica for lease in live_leases(chain)] == ["a"]
    assert [held.lease.replica for held in read_leases(chain)] == ["a", "b"]
    held = read_lease(chain, "b")
    assert held is not None
    assert held.lease.state == "ended"
    assert read_lease(chain, "c") is None


@pytest.mark.parametrize(
    ("expires_in", "later", "is_live"),
    [
        (60, 59, True),
        (60, 130, False),
        (-3600, 59, True),  # the replica's clock is behind: the store's counts
        (-3600, 61, False),
        (100, 90, True),  # a little ahead
        (10**6, 119, True),  # far ahead: for one more term, and no longer
        (10**6, 121, False),
    ],
)
def test_a_lease_expires_by_the_store_s_clock(chain: Chain, expires_in: float, later: float, is_live: bool) -> None:
    write_lease(chain, make_lease("a", 1, expires_in=expires_in))
    held = read_lease(chain, "a")
    assert held is not None
    now = held.modified_at + timedelta(seconds=later)
    assert bool(live_leases(chain, now)) is is_live


@pytest.mark.parametrize(
    ("fields", "term"),
    [
        ({"ttl_seconds": 1e300}, timedelta(days=7)),
        ({"expires_at": "2026-01-01T00:00:00"}, timedelta(minutes=1)),  # no zone: UTC
        ({"expires_at": "9999-12-31T23:59:59"}, timedelta(minutes=1)),
        ({"expires_at": "9999-12-31T23:59:59-23:59", "ttl_seconds": 1e300}, timedelta(days=7)),
        ({"expires_at": "soon"}, timedelta(minutes=1)),
    ],
)
def test_an_odd_lease_is_a_lease_for_a_bounded_time(chain: Chain, fields: dict[str, Any], term: timedelta) -> None:
    write_lease(chain, make_lease("a", 1, **fields))
    held = read_lease(chain, "a")
    assert held is not None
    assert held.is_live(held.modified_at + term - timedelta(seconds=1))
    assert not held.is_live(held.modified_at + 2 * term + timedelta(seconds=1))


def test_what_is_no_lease_is_passed_over_and_new_fields_are_ignored(chain: Chain) -> None:
    chain.store.put(keys.lease("broken"), b"{")
    chain.store.put(keys.lease("stranger"), b'{"version": 3}')
    body = make_lease("a", 2).model_dump_json()[:-1] + ', "colour": "red"}'
    chain.store.put(keys.lease("a"), body.encode())
    assert leased_versions(chain, live_leases(chain)) == {2}
    with pytest.raises(InputError):
        write_lease(chain, make_lease("../x", 2))


def _collect(chain: Chain, hours: float = 0) -> None:
    collect(chain, plan_gc(view_chain(chain, later(hours=hours)), grace=AT_ONCE))


def test_a_live_lease_keeps_the_version_that_it_stands_at_and_the_way_to_it(chain: Chain) -> None:
    """Invariant 6, while history is expired and collected under the replicas."""
    states = {version: read_state(chain, version).digests for version in (2, 4, 6)}
    write_lease(chain, make_lease("held", 2))
    write_lease(chain, make_lease("moving", None, moving_to=4))
    write_lease(chain, make_lease("gone", 5, state="ended"))
    expire_before(chain, 6)
    _collect(chain)
    fresh = Chain(chain.store)
    assert [held.lease.replica for held in read_leases(fresh)] == ["held", "moving"]
    assert {version: read_state(fresh, version).digests for version in states} == states
    with pytest.raises(VersionNotFoundError):
        fresh.manifest(5)
    assert fresh.versions() == (0, 1, 2, 3, 4, 6)
    assert verify_chain(fresh).holds

    _collect(chain, hours=1)
    assert Chain(chain.store).versions() == (6,)
    assert read_leases(chain) == (), "of replicas that are gone for longer than the grace period nothing stays"


def test_a_lease_at_what_is_gone_already_stops_no_collection(chain: Chain) -> None:
    expire_before(chain, 6)
    _collect(chain)
    write_lease(chain, make_lease("back from the dead".replace(" ", "-"), 3))
    assert leased_versions(chain, live_leases(chain)) == set()
    _collect(chain)
    assert Chain(chain.store).versions() == (6,)
