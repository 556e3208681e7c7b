"""Leases: the state that every replica writes below `records/replicas/` and renews while it lives.

A lease is a hint with a time to live, and the only kind of record that is replaced. People and flows read from leases
which replica serves which version; garbage collection keeps the versions that live leases name.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from weightline.chain.read.history import Chain
from weightline.errors import CorruptError, NotFoundError
from weightline.format import keys
from weightline.format.documents import MAX_NOTE_NBYTES, parse_json

#: Any process that may write to the bucket can write a lease, so a lease expires after a week at most.
MAX_TTL_SECONDS = 7 * 86400.0


class Lease(BaseModel):
    """The state of one replica. Fields of later releases are ignored, since nothing depends on them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    replica: str
    holder: str
    """Random id, kept in the replica's state folder, by which a restart differs from another replica of that name."""
    engine: str
    host: str
    pid: int
    release: str
    """Version of weightline."""
    url: str | None = None
    """The URL of its HTTP API; None when it has none that others can reach."""
    follows: str | None = None
    """`tip`, or the name of the ref that it follows by itself; None when it moves on request only."""
    state: str
    """`serving`, `loading` or `waiting`; `ended` after a clean shutdown."""
    version: int | None = None
    commit_id: str | None = None
    moving_to: int | None = None
    """The target of a move. Written before the move starts, so that garbage collection keeps the version."""
    served_at: str | None = None
    lag_versions: int | None = None
    lag_seconds: float | None = None
    """Age of the oldest version that it does not have yet; 0 at the tip."""
    last_error: str | None = None
    renewed_at: str
    """UTC time by the replica's clock."""
    expires_at: str
    ttl_seconds: float = Field(ge=0)
    """Seconds after the last renewal, by the store's clock, for which it counts as alive: at most MAX_TTL_SECONDS."""

    @property
    def versions(self) -> frozenset[int]:
        """Returns the versions that the replica may need: the one that it serves, and the one that it moves to."""
        return frozenset(version for version in (self.version, self.moving_to) if version is not None)


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease and the time of its last renewal. `modified_at` is by the store's clock."""

    lease: Lease
    modified_at: datetime

    def is_live(self, now: datetime) -> bool:
        """Returns whether the replica counts as alive.

        The later expiry of the store's and the replica's clock counts, so that a wrong clock drops no live replica.
        """
        if self.lease.state == "ended":
            return False
        term = timedelta(seconds=min(self.lease.ttl_seconds, MAX_TTL_SECONDS))
        by_store = self.modified_at + term
        try:
            by_replica = datetime.fromisoformat(self.lease.expires_at)
        except ValueError:
            by_replica = by_store
        if by_replica.tzinfo is None:
            by_replica = by_replica.replace(tzinfo=UTC)
        # A replica whose clock is a day ahead would never expire, so its own expiry counts for one more term at most.
        return now < max(by_store, min(by_replica, by_store + term))


def write_lease(chain: Chain, lease: Lease) -> None:
    """Writes or renews a lease. Safe to repeat. A crash leaves the previous lease, which expires."""
    chain.store.put(keys.lease(lease.replica), lease.model_dump_json(indent=1).encode())


def read_lease(chain: Chain, replica: str) -> HeldLease | None:
    """Returns the replica's lease, live or not; None when it is missing or cannot be read."""
    info = chain.store.head(keys.lease(replica))
    return None if info is None else _read(chain, info.key, info.modified_at)


def read_leases(chain: Chain) -> tuple[HeldLease, ...]:
    """Returns every lease, live or not, ordered by the replica's name. Objects that cannot be read are skipped."""
    found = (_read(chain, info.key, info.modified_at) for info in chain.store.list(keys.LEASES))
    return tuple(one for one in found if one is not None)


def live_leases(chain: Chain, now: datetime | None = None) -> tuple[Lease, ...]:
    """Returns the leases of replicas that are alive at `now`, by default the time of this host's clock."""
    moment = now or datetime.now(UTC)
    return tuple(held.lease for held in read_leases(chain) if held.is_live(moment))


def _read(chain: Chain, key: str, modified_at: datetime) -> HeldLease | None:
    try:
        lease = Lease.model_validate(parse_json(chain.store.get(key, MAX_NOTE_NBYTES)))
    except (NotFoundError, CorruptError, ValueError):  # pydantic's errors are ValueErrors
        return None
    return HeldLease(lease, modified_at) if key == f"{keys.LEASES}{lease.replica}/lease.json" else None
