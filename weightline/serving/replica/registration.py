"""A replica's lease: claimed at the start, renewed while it lives, ended at shutdown.

A renewal reads nothing from the disk and never raises: whatever goes wrong is logged, counted and tried again, so that
the thread that renews lives as long as the process.
"""

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
from weightline.errors import InputError, StorageError, WeightlineError
from weightline.files import write_atomically
from weightline.serving.replica.status import ReplicaStatus, error_text

_log = logging.getLogger(__name__)
#: Read once, when this module is imported: a renewal must not depend on the disk.
_RELEASE = release_of("weightline")
_MAX_HALVINGS = 3
HOLDER_FILE = "holder"


@dataclass(frozen=True, slots=True)
class Presence:
    """The part of a lease that does not change while the process lives."""

    url: str | None = None
    follows: str | None = None
    ttl_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 0 < self.ttl_seconds <= 86400:
            raise InputError(f"lease TTL must be 1 to 86400 s, got {self.ttl_seconds:g}", field="ttl_seconds")


def require_free_name(chain: Chain, name: str, state_dir: Path) -> None:
    """Raises InputError when a live replica with another state folder has the name. A storage error is logged."""
    other = _other_holder(chain, name, _holder_of(state_dir))
    if other is not None:
        raise InputError(f"{_taken(chain, other)}: give this one another --name", name=name)


class Registration:
    """One replica's lease. Every renewal writes `status()` and `moving_to`. Safe to use from many threads.

    `on_failure` is called with the error of every renewal that failed.
    """

    def __init__(
        self,
        chain: Chain,
        state_dir: Path,
        presence: Presence,
        status: Callable[[], ReplicaStatus],
        on_failure: Callable[[Exception], object] = lambda _: None,
    ) -> None:
        self._chain, self.presence, self._status, self._on_failure = chain, presence, status, on_failure
        self._state_dir, self._holder = state_dir, _holder_of(state_dir)
        self._is_ended = False
        self._is_asked = threading.Event()
        self._thread: threading.Thread | None = None
        self.moving_to: int | None = None
        self.num_failures = 0
        self.last_error: str | None = None

    def claim(self) -> None:
        """Takes the name. InputError when another live replica has it; a restart of this one keeps it."""
        name = self._status().replica
        require_free_name(self._chain, name, self._state_dir)
        self.renew()
        # Two replicas may have seen a free name at the same moment. Only one lease stays; the other replica fails here.
        require_free_name(self._chain, name, self._state_dir)

    def renew(self) -> bool:
        """Writes the lease. Returns False after an error, which is logged, counted and not raised.

        Never replaces the live lease of another replica: a replica whose lease expired and whose name another one took
        stays without a lease.
        """
        if self._is_ended:
            return True
        return self._attempt(self._renew)

    def _renew(self) -> None:
        lease = self._lease(self._status())
        other = _other_holder(self._chain, lease.replica, self._holder)
        if other is None:
            self._write(lease)
            self.last_error = None
            return
        self._is_ended = True
        self.last_error = f"{_taken(self._chain, other)}: this one is no longer registered, restart it"
        _log.error("%s", self.last_error)

    def renew_until(self, stopping: threading.Event) -> None:
        """Renews the lease three times in its length, and when asked, until `stopping` is set and `wake` was called.

        For a thread of its own. After an error it tries again sooner: the waits double up to the usual one.
        """
        self._thread, num_failures = threading.current_thread(), 0
        while True:
            self._is_asked.wait(self._wait_seconds(num_failures))
            self._is_asked.clear()
            if stopping.is_set():
                return
            num_failures = 0 if self.renew() else num_failures + 1

    def wake(self) -> None:
        """Lets the thread that renews renew at once, or end."""
        self._is_asked.set()

    def renew_soon(self) -> None:
        """Renews the lease on its thread, so that the caller need not wait for the bucket; here if there is none."""
        if self._thread is not None and self._thread.is_alive():
            self.wake()
        else:
            self.renew()

    def _wait_seconds(self, num_failures: int) -> float:
        halvings = max(0, _MAX_HALVINGS + 1 - num_failures) if num_failures else 0
        return self.presence.ttl_seconds / 3 / 2**halvings

    @contextmanager
    def moving(self, version: int | None, *, is_tip: bool = False) -> Iterator[None]:
        """Writes the version to move to (None: no move) before anything is read, and the result afterwards.

        Garbage collection keeps the tip whatever the leases say, so a move to it is not announced, and does not wait
        for the write of its result.
        """
        if version is not None:
            self.moving_to = version
            if not is_tip:
                self.renew()
        try:
            yield
        finally:
            self.moving_to = None
            if is_tip:
                self.renew_soon()
            else:
                self.renew()

    def end(self) -> None:
        """Ends the lease. Safe to repeat; nothing is renewed after it. An error is logged: the lease expires then."""
        self._is_ended = True
        self._attempt(self._end)

    def _end(self) -> None:
        ended = self._lease(self._status()).model_copy(update={"state": "ended", "moving_to": None})
        if _other_holder(self._chain, ended.replica, self._holder) is None:
            self._write(ended)

    def _write(self, lease: Lease) -> None:
        write_lease(self._chain, lease)

    def _attempt(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except WeightlineError as error:
            _log.warning("the lease could not be renewed in %s: %s", self._chain.url, error)
            self._count(error)
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            _log.exception("the lease could not be renewed in %s", self._chain.url)
            self._count(error)
        else:
            return True
        return False

    def _count(self, error: Exception) -> None:
        self.num_failures += 1
        self.last_error = error_text(error)
        self._on_failure(error)

    def _lease(self, status: ReplicaStatus) -> Lease:
        now = datetime.now(UTC)
        return Lease(
            replica=status.replica,
            holder=self._holder,
            engine=status.engine,
            host=socket.gethostname(),
            pid=os.getpid(),
            release=_RELEASE,
            url=self.presence.url,
            follows=self.presence.follows,
            state=status.state,
            version=status.version,
            commit_id=status.commit_id,
            moving_to=self.moving_to,
            served_at=status.served_at,
            lag_versions=status.lag_versions,
            lag_seconds=status.lag_seconds,
            last_error=status.last_error or status.follow_error,
            renewed_at=_text(now),
            expires_at=_text(now + timedelta(seconds=self.presence.ttl_seconds)),
            ttl_seconds=self.presence.ttl_seconds,
        )


def _other_holder(chain: Chain, name: str, holder: str) -> Lease | None:
    """Returns another replica's live lease of the name; None without one, or while the bucket fails."""
    try:
        held = read_lease(chain, name)
    except StorageError as error:
        _log.warning("cannot check whether the name %s is free: %s", name, error)
        return None
    is_anothers = held is not None and held.lease.holder != holder and held.is_live(datetime.now(UTC))
    return held.lease if held is not None and is_anothers else None


def _taken(chain: Chain, lease: Lease) -> str:
    return f"a replica {lease.replica!r} of {chain.url} is alive on {lease.host} (process {lease.pid})"


def _text(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _holder_of(state_dir: Path) -> str:
    """Returns the state folder's id, created at first use. A restart with the same folder has the same id."""
    path = state_dir / HOLDER_FILE
    if not path.exists():
        write_atomically(path, secrets.token_hex(16))
    return path.read_text().strip()
