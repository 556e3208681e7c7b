"""A replica's lease: claimed first, renewed while it lives, ended when it leaves. A failing bucket stops nothing."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as release_of
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.read.leases import Lease, read_lease, write_lease
from weightline.errors import InputError, StorageError
from weightline.files import write_atomically
from weightline.serving.replica.status import ReplicaStatus

_log = logging.getLogger(__name__)
HOLDER_FILE = "holder"


@dataclass(frozen=True, slots=True)
class Presence:
    """What a lease says that does not change while the process lives."""

    url: str | None = None
    follows: str | None = None
    ttl_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.ttl_seconds <= 86400:
            raise InputError(f"a lease of {self.ttl_seconds:g} s is none: name 1 to 86400", field="ttl_seconds")


def require_free_name(chain: Chain, name: str, state_dir: Path) -> None:
    """InputError when a replica with another state folder lives under the name. A bucket that fails is logged."""
    other = _other_holder(chain, name, _holder_of(state_dir))
    if other is not None:
        raise InputError(f"{_taken(chain, other)}: give this one another --name", name=name)


class Registration:
    """One replica's lease. `status` and `moving_to` are told at every renewal. Safe to use from many threads."""

    def __init__(self, chain: Chain, state_dir: Path, presence: Presence, status: Callable[[], ReplicaStatus]) -> None:
        self._chain, self.presence, self._status = chain, presence, status
        self._state_dir, self._holder = state_dir, _holder_of(state_dir)
        self._is_ended = False
        self.moving_to: int | None = None
        self.num_failures = 0

    def claim(self) -> None:
        """Take the name. InputError when another replica lives under it; a restart of this one goes on with it."""
        name = self._status().replica
        require_free_name(self._chain, name, self._state_dir)
        self.renew()
        # Of two that saw a free name at the same moment, one's lease stands: the other leaves.
        require_free_name(self._chain, name, self._state_dir)

    def renew(self) -> None:
        """Write the lease as things stand. A bucket that fails is logged and counted: the next renewal tries again.

        Never over the lease of another that lives: who lost its name, having been away for too long, stays without one.
        """
        if self._is_ended:
            return
        lease = self._lease(self._status())
        other = _other_holder(self._chain, lease.replica, self._holder)
        if other is None:
            self._write(lease)
            return
        self._is_ended = True
        _log.error("%s: this one is no longer registered, restart it", _taken(self._chain, other))

    def renew_until(self, stopping: threading.Event) -> None:
        """Renew three times a lease's length, until told to stop: for a thread of its own."""
        while not stopping.wait(self.presence.ttl_seconds / 3):
            self.renew()

    @contextmanager
    def moving(self, version: int | None) -> Iterator[None]:
        """Told before anything is read on the way (None: it stays where it is), and where it ended afterwards."""
        if version is not None:
            self.moving_to = version
            self.renew()
        try:
            yield
        finally:
            self.moving_to = None
            self.renew()

    def end(self) -> None:
        """Say that the replica leaves. Safe to repeat; nothing is renewed after it."""
        self._is_ended = True
        ended = self._lease(self._status()).model_copy(update={"state": "ended", "moving_to": None})
        if _other_holder(self._chain, ended.replica, self._holder) is None:
            self._write(ended)

    def _write(self, lease: Lease) -> None:
        try:
            write_lease(self._chain, lease)
        except StorageError as error:
            self.num_failures += 1
            _log.warning("the lease of replica %s could not be renewed: %s", lease.replica, error)

    def _lease(self, status: ReplicaStatus) -> Lease:
        now = datetime.now(UTC)
        return Lease(
            replica=status.replica,
            holder=self._holder,
            engine=status.engine,
            host=socket.gethostname(),
            pid=os.getpid(),
            release=release_of("weightline"),
            url=self.presence.url,
            follows=self.presence.follows,
            state=status.state,
            version=status.version,
            commit_id=status.commit_id,
            moving_to=self.moving_to,
            served_at=status.served_at,
            lag_versions=status.lag_versions,
            lag_seconds=status.lag_seconds,
            last_error=status.last_error,
            renewed_at=_text(now),
            expires_at=_text(now + timedelta(seconds=self.presence.ttl_seconds)),
            ttl_seconds=self.presence.ttl_seconds,
        )


def _other_holder(chain: Chain, name: str, holder: str) -> Lease | None:
    """The live lease of another; None where there is none, or the bucket cannot say."""
    try:
        held = read_lease(chain, name)
    except StorageError as error:
        _log.warning("whether the name %s is free cannot be seen: %s", name, error)
        return None
    is_anothers = held is not None and held.lease.holder != holder and held.is_live(datetime.now(UTC))
    return held.lease if held is not None and is_anothers else None


def _taken(chain: Chain, lease: Lease) -> str:
    return f"a replica {lease.replica!r} of {chain.url} is alive on {lease.host} (process {lease.pid})"


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _holder_of(state_dir: Path) -> str:
    """Made once for a state folder, which one process has at a time."""
    path = state_dir / HOLDER_FILE
    if not path.exists():
        write_atomically(path, secrets.token_hex(16))
    return path.read_text().strip()
