"""Pushes each version to replicas the moment it is committed, so that none waits for its next look at the bucket.

For rank 0. A replica that does not answer follows the chain as before: a failure is logged and counted, and training
goes on.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import httpx

from weightline.chain.read.history import open_chain
from weightline.chain.read.leases import live_leases
from weightline.errors import WeightlineError
from weightline.serving.http import client
from weightline.serving.http.auth import TOKEN_VARIABLE
from weightline.serving.http.hosts import is_trusted_url, may_receive_token
from weightline.serving.http.names import KEEPALIVE_SECONDS
from weightline.serving.replica.following import TIP, record_refresh
from weightline.serving.replica.status import RefreshFacts

_logger = logging.getLogger(__name__)
_REFRESH_SECONDS = 120.0
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Pushed:
    """A version that was pushed to a replica, which serves it."""

    version: int
    url: str
    committed_at: float
    """When the commit was done, by the monotonic clock, as the other times."""
    sent_at: float
    served_at: float
    """When the replica answered: it serves this version or a later one."""
    facts: RefreshFacts


class Pusher:
    """Posts `/weightline/refresh` to the replicas of a chain. Its methods may be called from any thread.

    They are those that follow the chain's tip, by their leases, on hosts that may receive the token of
    WEIGHTLINE_TOKEN, and those that the user names. A replica that follows a ref, or moves on request only, is left
    alone: it would serve a version before it was judged.
    """

    def __init__(self, chain_url: str, named: Mapping[str, str] | None = None, *, look_seconds: float = 2.0) -> None:
        """Starts the thread that reads leases and records moves. `named`: tokens of further replicas, by their URL.

        InputError for a pattern of WEIGHTLINE_REPLICA_HOSTS that is none.
        """
        is_trusted_url(None)
        self._chain = open_chain(chain_url)
        self._named = {url.rstrip("/"): token for url, token in (named or {}).items()}
        self._look_seconds = look_seconds
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        self._newest: tuple[int, float] | None = None
        self._unrecorded: queue.SimpleQueue[RefreshFacts] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        self.num_pushed = 0
        """Moves that replicas have made after a push."""
        self.num_failures = 0
        self.last_pushed: Pushed | None = None
        self._thread = threading.Thread(target=self._look, name="weightline-push", daemon=True)
        self._thread.start()

    def committed(self, version: int, commit_id: str = "") -> None:
        """Pushes a version that was committed just now to all replicas. Returns at once and raises nothing.

        A replica that is still on its way to an earlier one gets the newest only.
        """
        with self._lock:
            self._newest = version, time.monotonic()
            for line in self._lines.values():
                line.push(*self._newest)

    def close(self) -> None:
        """Ends all threads. What is under way gets a few seconds. Safe to repeat."""
        self._is_closed.set()
        with self._lock:
            lines = list(self._lines.values())
        for line in lines:
            line.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in (self._thread, *(line.thread for line in lines)):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _look(self) -> None:
        """Keeps a line to every replica that may get versions, by its lease. A look at the bucket delays no push."""
        while True:
            try:
                self._meet(self._targets())
            except WeightlineError as error:
                _logger.warning("versions are pushed to no new replica, since leases cannot be read: %s", error)
            except Exception:
                _logger.exception("the leases of %s cannot be read", self._chain.url)
            is_closed = self._is_closed.wait(self._look_seconds)
            self._record()
            if is_closed:
                return

    def _targets(self) -> dict[str, str]:
        """Returns the token of each replica that gets versions, by its URL."""
        found = dict(self._named)
        token = os.environ.get(TOKEN_VARIABLE, "")
        for lease in live_leases(self._chain):
            if lease.url is not None and lease.follows == TIP and may_receive_token(lease):
                found.setdefault(lease.url.rstrip("/"), token)
        return found

    def _meet(self, targets: Mapping[str, str]) -> None:
        with self._lock:
            for url in self._lines.keys() - targets.keys():
                self._lines.pop(url).close()
            for url in targets.keys() - self._lines.keys():
                if self._is_closed.is_set():
                    return
                line = self._lines[url] = _Line(url, targets[url], self._chain.url, self._note)
                if self._newest is not None:
                    line.push(*self._newest)

    def _record(self) -> None:
        """Records the moves that were made since the last time, as a replica does that moves by itself."""
        while not self._unrecorded.empty():
            facts = self._unrecorded.get()
            try:
                record_refresh(self._chain, facts.version, facts.replica, facts)
            except WeightlineError as error:
                _logger.warning("that %s serves version %d is not recorded: %s", facts.replica, facts.version, error)

    def _note(self, pushed: Pushed | None) -> None:
        with self._lock:
            if pushed is None:
                self.num_failures += 1
            else:
                self.num_pushed += 1
                self.last_pushed = pushed
                if pushed.facts.version != pushed.facts.from_version:
                    self._unrecorded.put(pushed.facts)


class _Line:
    """The thread that pushes to one replica, the newest version only, so that a slow one holds no other up."""

    def __init__(self, url: str, token: str, chain_url: str, note: Callable[[Pushed | None], None]) -> None:
        self._url, self._token, self._chain_url, self._note = url, token, chain_url, note
        self._waiting: tuple[int, float] | None = None
        self._http = httpx.Client(trust_env=False, limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS))
        self._is_closed = False
        self._arrived = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="weightline-push-replica", daemon=True)
        self.thread.start()

    def push(self, version: int, committed_at: float) -> None:
        with self._arrived:
            self._waiting = version, committed_at
            self._arrived.notify()

    def close(self) -> None:
        with self._arrived:
            self._is_closed = True
            self._arrived.notify()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            version, committed_at = task
            sent_at = time.monotonic()
            try:
                facts = client.refresh(
                    self._url, self._token, version, chain=self._chain_url, timeout_seconds=_REFRESH_SECONDS,
                    http=self._http,
                )  # fmt: skip
            except WeightlineError as error:
                _logger.warning("the replica at %s was not moved to version %d: %s", self._url, version, error)
                self._note(None)
            except Exception:
                _logger.exception("the replica at %s was not moved to version %d", self._url, version)
                self._note(None)
            else:
                self._note(Pushed(version, self._url, committed_at, sent_at, time.monotonic(), facts))
        self._http.close()

    def _next(self) -> tuple[int, float] | None:
        """Returns the newest version that was not pushed to the replica; None at the end."""
        with self._arrived:
            self._arrived.wait_for(lambda: self._is_closed or self._waiting is not None)
            task, self._waiting = self._waiting, None
            return None if self._is_closed else task
