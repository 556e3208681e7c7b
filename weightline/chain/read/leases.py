"""Leases: what every replica says of itself below `records/replicas/`, for as long as it goes on saying it.

The one kind of record that is replaced: a lease is a hint with a time to live. It tells people and flows who serves
what, and garbage collection which versions somebody stands at.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from weightline.chain.read.history import Chain
from weightline.errors import NotFoundError
from weightline.format import keys

#: Anybody who may write to the bucket can write a lease: none holds versions for longer than a week.
MAX_TTL_SECONDS = 7 * 86400.0


class Lease(BaseModel):
    """One replica's account. Fields of later releases are ignored: nothing depends on them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    replica: str
    holder: str
    """Random, kept in the replica's state folder: tells a restart from another replica of the same name."""
    engine: str
    host: str
    pid: int
    release: str
    """Version of weightline."""
    url: str | None = None
    """Where it answers; None when it is not to be asked."""
    follows: str | None = None
    """`tip`, or the name of the ref that it follows by itself; None: it moves when it is told."""
    state: str
    """`serving`, `loading`, `waiting`; `ended` when it left in order."""
    version: int | None = None
    commit_id: str | None = None
    moving_to: int | None = None
    """Announced before a move starts, so that nothing of it is collected under way."""
    served_at: str | None = None
    lag_versions: int | None = None
    lag_seconds: float | None = None
    """Age of the oldest version that it does not have yet; 0 at the tip."""
    last_error: str | None = None
    renewed_at: str
    """UTC, the replica's clock."""
    expires_at: str
    ttl_seconds: float = Field(ge=0)
    """How long after its last renewal, by the store's clock, it counts as alive: at most MAX_TTL_SECONDS."""

    @property
    def versions(self) -> frozenset[int]:
        """What it may need: where it stands, and where it is going."""
        return frozenset(version for version in (self.version, self.moving_to) if version is not None)


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as the store has it. `modified_at` is the store's clock."""

    lease: Lease
    modified_at: datetime

    def is_live(self, now: datetime) -> bool:
        """Whether the replica is to be taken for alive. By the later of both clocks: a wrong one loses nobody."""
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
        # A replica whose clock is a day ahead would never expire: its own word counts for one more term at most.
        return now < max(by_store, min(by_replica, by_store + term))


def write_lease(chain: Chain, lease: Lease) -> None:
    """Put or renew it. Safe to repeat; a crash leaves the one before, which expires."""
    chain.store.put(keys.lease(lease.replica), lease.model_dump_json(indent=1).encode())


def read_lease(chain: Chain, replica: str) -> HeldLease | None:
    """The replica's lease, live or not; None where there is none that can be read."""
    info = chain.store.head(keys.lease(replica))
    return None if info is None else _read(chain, info.key, info.modified_at)


def read_leases(chain: Chain) -> tuple[HeldLease, ...]:
    """Every lease, live or not, by the replica's name. What is no lease is passed over."""
    found = (_read(chain, info.key, info.modified_at) for info in chain.store.list(keys.LEASES))
    return tuple(one for one in found if one is not None)


def live_leases(chain: Chain, now: datetime | None = None) -> tuple[Lease, ...]:
    """The leases of replicas that are alive. `now`: as near to the store's clock as one can get."""
    moment = now or datetime.now(UTC)
    return tuple(held.lease for held in read_leases(chain) if held.is_live(moment))


def _read(chain: Chain, key: str, modified_at: datetime) -> HeldLease | None:
    try:
        return HeldLease(Lease.model_validate_json(chain.store.get(key)), modified_at)
    except (NotFoundError, ValidationError):
        return None
