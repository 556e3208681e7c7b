"""The replicas that a front knows: found by their leases or named, and watched by one long poll each.

A lease says where a replica is, and the replica itself says which version it serves. A request of the front waits at
the replica until that version changes, so the front knows of a move as soon as the replica has made it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import BaseModel, ValidationError

from weightline.chain import Chain
from weightline.chain.read.history import is_same_chain
from weightline.chain.read.leases import live_leases
from weightline.errors import WeightlineError
from weightline.front.affinity import Ranking, first_with_room
from weightline.front.metrics import FrontMetrics
from weightline.serving.engines.base import VersionBounds
from weightline.serving.http.client import backoff_seconds
from weightline.serving.http.hosts import REPLICA_HOSTS_VARIABLE, is_trusted_url
from weightline.serving.replica.status import ServedVersion

_log = logging.getLogger(__name__)

LEASE_SECONDS = 2.0
#: How long a replica keeps a poll open while nothing changes: a move backward is seen so late at the latest.
POLL_SECONDS = 2.0
_GRACE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.2, 2.0
#: Polls in a row that fail before requests under way are taken from a replica: one may fail in a restart of a proxy.
_FAILURES_UNTIL_GONE = 2


class _Identity(BaseModel):
    """The part of GET /weightline/status that says whether the server is a replica of this chain."""

    replica: str
    chain: str


@dataclass
class Member:
    """One replica. Used on the event loop's thread only."""

    name: str
    url: str
    is_named: bool = False
    facts: ServedVersion | None = None
    """What it said last; None while it does not answer."""
    error: str | None = "it was not asked yet"
    """Why it gets no requests; None while it gets some."""
    num_in_flight: int = 0
    num_answered: int = 0
    num_failed: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while the replica does not answer polls. Requests under way are then sent elsewhere."""

    @property
    def version(self) -> int | None:
        return None if self.facts is None else self.facts.version

    def status(self) -> dict[str, Any]:
        """Returns the member's row of the front's status."""
        return {
            "replica": self.name, "url": self.url, "is_up": self.version is not None, "version": self.version,
            "moving_to": self.facts.moving_to if self.facts else None, "in_flight": self.num_in_flight,
            "answered": self.num_answered, "failed": self.num_failed, "error": self.error,
        }  # fmt: skip


class Replicas:
    """The replicas of a chain, as far as the front may send requests to them."""

    def __init__(
        self, chain: Chain, urls: Iterable[str], client: httpx.AsyncClient, metrics: FrontMetrics, rank: Ranking
    ) -> None:
        self._chain, self._client, self._metrics, self._rank = chain, client, metrics, rank
        self._members: dict[str, Member] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._refused: dict[str, str] = {}
        self._named = tuple(dict.fromkeys(url.rstrip("/") for url in urls))
        self.lease_error: str | None = None

    # What requests ask.

    def up(self) -> list[Member]:
        """Returns the members that serve a version."""
        return [member for member in self._members.values() if member.version is not None]

    def newest(self) -> Member | None:
        """Returns a member that serves the newest version that any serves."""
        return max(self.up(), key=lambda member: member.version or 0, default=None)

    def choose(self, bounds: VersionBounds, key: str, without: Collection[str]) -> tuple[Member, bool] | None:
        """Returns the member that should answer, and whether it is the key's home; None when none may."""
        able = {member.name: member for member in self.up() if bounds.accept(member.version)}
        ranking = self._rank(key, able)
        left = [name for name in ranking if name not in without]
        if not left:
            return None
        chosen = first_with_room(left, {name: member.num_in_flight for name, member in able.items()})
        return able[chosen], chosen == ranking[0]

    def serve(self, bounds: VersionBounds) -> bool:
        """Returns whether a member is known to serve a version that may answer."""
        return any(bounds.accept(member.version) for member in self.up())

    @contextmanager
    def carrying(self, member: Member) -> Iterator[None]:
        """Counts a request as under way at the member for the length of the block."""
        member.num_in_flight += 1
        try:
            yield
        finally:
            member.num_in_flight -= 1

    async def changed(self, seconds: float) -> None:
        """Waits until a member changes, but no longer than the seconds."""
        event = self._changed
        try:
            await asyncio.wait_for(event.wait(), max(0.0, seconds))
        except TimeoutError:
            pass

    async def ask_all(self) -> None:
        """Asks every member for its version now: polls may be a moment behind a move that has just been made."""
        await asyncio.gather(*(self._ask(member, wait_seconds=0.0) for member in self.up()))

    def serves(self, member: Member, version: int | None) -> None:
        """Notes the version that an answer of the member named."""
        if member.facts is not None and version is not None and version != member.facts.version:
            self._note(member, member.facts.model_copy(update={"version": version}))

    def status(self) -> dict[str, Any]:
        """Returns the rows of the front's status, ordered by name, and what is not asked and why."""
        rows = sorted(self._members.values(), key=lambda member: member.name)
        return {
            "replicas": [member.status() for member in rows],
            "refused": self._refused,
            "lease_error": self.lease_error,
        }

    def reasons(self) -> dict[str, str]:
        """Returns why replicas that are known get no requests, by name."""
        return self._refused | {one.name: one.error for one in self._members.values() if one.error is not None}

    # How they are found and watched.

    async def run(self) -> None:
        """Finds and watches replicas until it is cancelled."""
        try:
            for url in self._named:
                self._add(Member(url, url, is_named=True))
            while True:
                await self._find()
                await asyncio.sleep(LEASE_SECONDS)
        finally:
            for watch in self._watches.values():
                watch.cancel()
            await asyncio.gather(*self._watches.values(), return_exceptions=True)

    async def _find(self) -> None:
        """Reads the leases. While the bucket fails, the replicas that are known stay."""
        try:
            leases = await asyncio.to_thread(live_leases, self._chain)
            found: dict[str, str] = {}
            refused: dict[str, str] = {}
            for lease in leases:
                if lease.url is None:
                    refused[lease.replica] = "its lease names no URL: start it with --advertise"
                elif not is_trusted_url(lease.url):
                    refused[lease.replica] = f"{REPLICA_HOSTS_VARIABLE} does not allow the host of {lease.url}"
                elif lease.url.rstrip("/") not in self._named:
                    found[lease.replica] = lease.url.rstrip("/")
        except WeightlineError as error:
            self.lease_error = str(error)
            _log.warning("the leases of %s cannot be read: %s", self._chain.url, error)
            return
        self.lease_error = None
        for name, why in refused.items():
            if self._refused.get(name) != why:
                _log.warning("replica %s gets no requests: %s", name, why)
        self._refused = refused
        for name, member in list(self._members.items()):
            if not member.is_named and found.get(name) != member.url:
                self._remove(member)
        for name, url in found.items():
            if name not in self._members:
                self._add(Member(name, url))

    def _add(self, member: Member) -> None:
        _log.info("replica %s at %s joins", member.name, member.url)
        self._members[member.name] = member
        self._watches[member.name] = asyncio.create_task(self._watch(member))

    def _remove(self, member: Member) -> None:
        _log.info("replica %s at %s leaves: its lease ended or names another URL", member.name, member.url)
        del self._members[member.name]
        self._watches.pop(member.name).cancel()
        self._tell()

    async def _watch(self, member: Member) -> None:
        """Keeps the member's facts up to date until it is cancelled. No error ends it."""
        num_failures = 0
        while True:
            began = time.monotonic()
            is_known = member.facts is not None or await self._identify(member)
            if is_known and await self._ask(member, wait_seconds=POLL_SECONDS if member.facts else 0.0):
                num_failures = 0
                member.gone.clear()
                # A server that answers at once although nothing has changed must not be asked in a loop.
                await asyncio.sleep(max(0.0, 0.05 - (time.monotonic() - began)))
                continue
            num_failures += 1
            if num_failures >= _FAILURES_UNTIL_GONE:
                member.gone.set()
            await asyncio.sleep(backoff_seconds(num_failures, _FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS))

    async def _identify(self, member: Member) -> bool:
        """Returns whether a replica of this chain listens at the member's URL, and not another server."""
        try:
            answer = await self._client.get(f"{member.url}/weightline/status", timeout=_GRACE_SECONDS)
            identity = _Identity.model_validate_json(answer.raise_for_status().content)
        except (httpx.HTTPError, ValidationError) as error:
            self._lose(member, error)
            return False
        if not is_same_chain(identity.chain, self._chain.url):
            self._lose(member, ValueError(f"it follows {identity.chain}"))
            return False
        return True

    async def _ask(self, member: Member, wait_seconds: float) -> bool:
        """Asks for the version, and notes it. Returns False, and notes why, when there is no answer."""
        least = -1 if member.version is None else member.version
        query = {"min": str(least + 1), "wait": f"{wait_seconds:g}"}
        try:
            answer = await self._client.get(
                f"{member.url}/weightline/version", params=query, timeout=wait_seconds + _GRACE_SECONDS
            )
            facts = ServedVersion.model_validate_json(answer.raise_for_status().content)
        except (httpx.HTTPError, ValidationError) as error:
            self._lose(member, error)
            return False
        self._note(member, facts)
        return True

    def lose(self, member: Member, error: Exception) -> None:
        """Notes that a request did not reach the member: it gets no further ones until it answers a poll."""
        if isinstance(error, httpx.ConnectError):
            self._lose(member, error)

    def _lose(self, member: Member, error: Exception) -> None:
        if member.error is None:
            _log.warning("replica %s at %s does not answer: %r", member.name, member.url, error)
        member.facts, member.error = None, str(error) or type(error).__name__
        self._metrics.set_version(member.name, None)
        self._tell()

    def _note(self, member: Member, facts: ServedVersion) -> None:
        if facts == member.facts:
            return
        if member.version != facts.version:
            _log.info("replica %s serves version %s", member.name, facts.version)
        member.facts = facts
        member.error = None if facts.version is not None else facts.last_error or "it serves no version yet"
        self._metrics.set_version(member.name, facts.version)
        self._tell()

    def _tell(self) -> None:
        """Wakes the requests that wait for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
