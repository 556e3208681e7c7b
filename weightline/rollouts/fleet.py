"""The replicas of a chain as one source of samples: finds them, splits work over them, and asks again elsewhere.

Replicas are found by their leases, which are read again every few seconds, or by URLs that the user names. One task a
replica waits for its next version by a long poll, so that work is sent to it as soon as it serves a version that may
answer. A replica that cannot be reached is behind, not lost: it gets work again when it is back.

Work is cut into requests as replicas are free for them, so that a faster replica, or one that joins in the middle,
gets more of it. A request that fails is made again, whole and with the same seeds, by the replica that is free next.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from weightline.chain.read.history import Chain, is_same_chain, open_chain
from weightline.chain.read.leases import Lease, live_leases
from weightline.errors import ApplyError, InputError, RolloutError, VersionNotServedError, WeightlineError
from weightline.rollouts.client import Mixing, Offer, ReplicaClient, Wanted
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling
from weightline.serving.http.client import backoff_seconds
from weightline.serving.http.hosts import REPLICA_HOSTS_VARIABLE, is_trusted_url

_logger = logging.getLogger(__name__)

#: Seconds of a long poll, and of its pauses after errors.
_POLL_SECONDS = 20.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.2, 3.0
#: A server that answers a long poll sooner, with nothing new, is asked again only after this time.
_LEAST_POLL_SECONDS = 0.2
#: Polls in a row without an answer after which nothing is expected of a replica any more.
_FAILURES_OF_LOST = 3
#: What a replica has to do at a time: requests of many prompts, which it computes one after the other, or samples.
_MAX_REQUESTS, _MAX_SAMPLES = 2, 512
_MAX_SAMPLES_OF_REQUEST = 1024


_Request = asyncio.Future[tuple[tuple[Sample, ...], ...]]


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that are made together: `n` of one prompt, by one seed."""

    prompt_ids: tuple[int, ...]
    n: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that a replica answered."""

    replica: str
    begun_at: float
    """By the monotonic clock, as `ended_at`."""
    ended_at: float
    num_samples: int


@dataclass(slots=True)
class Progress:
    """What has become of some groups so far. Belongs to the event loop."""

    samples: list[tuple[Sample, ...] | None]
    """Of each group; None while it is to be made."""
    begun_at: float | None = None
    """When the first request was sent."""
    answered: list[Answered] = field(default_factory=list)
    num_retries: int = 0

    def add(self, other: Progress) -> None:
        """Counts what was done for one turn of an episode."""
        self.begun_at = other.begun_at if self.begun_at is None else self.begun_at
        self.answered += other.answered
        self.num_retries += other.num_retries


@dataclass(slots=True, eq=False)
class _Member:
    """A replica as this process sees it."""

    url: str
    client: ReplicaClient
    is_leased: bool
    offer: Offer | None = None
    """None while it cannot be reached."""
    version: int | None = None
    last_error: str | None = None
    problem: str | None = "it has not answered yet"
    """Why it gets no work now; None when it may."""
    num_requests: int = 0
    num_samples: int = 0
    num_failures: int = 0
    """Of requests, in a row."""
    blocked_until: float = 0.0
    is_lost: bool = False
    """Whether it has not answered several times in a row: what it was asked for is made elsewhere."""
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.url if self.offer is None else self.offer.replica

    def is_free(self) -> bool:
        """Returns whether it can take one more request."""
        if self.offer is None or self.problem is not None or time.monotonic() < self.blocked_until:
            return False
        return self.num_requests < _MAX_REQUESTS if self.offer.takes_many else self.num_samples < _MAX_SAMPLES

    def describe(self) -> str:
        """Returns one line for people."""
        at = f"{self.name} at {self.url}" if self.name != self.url else self.url
        if self.offer is None:
            return f"{at} is away ({self.problem})"
        holds = "no version" if self.version is None else f"version {self.version}"
        mode = None if _is_processed(self.offer) else f"its logprobs are {self.offer.logprobs_mode}"
        reasons = [reason for reason in (self.problem, mode, self.last_error) if reason]
        return f"{at} serves {holds}" + (f" ({'; '.join(reasons)})" if reasons else "")


class ReplicaFleet:
    """The replicas of a chain. All methods but `__init__` and `describe` belong to one event loop."""

    def __init__(
        self,
        chain_url: str,
        urls: Sequence[str] | None = None,
        *,
        mixing: Mixing = "deny",
        look_seconds: float = 2.0,
        request_seconds: float = 300.0,
        turn: int = 0,
    ) -> None:
        """Opens nothing yet.

        Args:
            chain_url: The chain whose versions they serve.
            urls: The replicas. None: those with a live lease, on hosts that WEIGHTLINE_REPLICA_HOSTS allows.
            mixing: Whether a replica may go on with a request while it moves to another version.
            look_seconds: Time between two looks at the leases.
            request_seconds: A request that takes longer is lost, and made again.
            turn: The rank: ranks begin with different replicas.
        """
        if urls is not None and not urls:
            raise InputError("no replica is named: name their URLs, or follow the leases", field="replicas")
        self.chain_url, self._urls, self.mixing = chain_url, urls, mixing
        self._look_seconds, self._request_seconds, self._turn = look_seconds, request_seconds, turn
        self._members: dict[str, _Member] = {}
        self._distrusted: tuple[str, ...] = ()
        self._look_error: str | None = None
        self._looking: asyncio.Task[None] | None = None
        self._change: asyncio.Future[None]
        self.num_errors: dict[str, int] = {}
        """Requests that failed, by replica."""

    async def start(self) -> None:
        """Begins to look for replicas and to watch them. InputError for a pattern of hosts that is none."""
        self._change = asyncio.get_running_loop().create_future()
        for url in self._urls or ():
            self._add(url, is_leased=False)
        if self._urls is None:
            is_trusted_url(None)
            self._looking = asyncio.create_task(self._look(open_chain(self.chain_url)))

    async def close(self) -> None:
        """Ends all tasks and connections."""
        tasks = [task for task in (self._looking, *(one.task for one in self._members.values())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members.values():
            await member.client.close()

    def describe(self) -> tuple[str, ...]:
        """Returns a line for each replica, and for each lease that is not followed."""
        found = [member.describe() for member in list(self._members.values())]
        if self._look_error is not None:
            found.append(f"the leases of {self.chain_url} cannot be read: {self._look_error}")
        return (*found, *self._distrusted)

    def error(self, wanted: Wanted, what: str, seconds: float) -> RolloutError:
        """Returns the error of work that no replica has done in time. It names every replica."""
        lines = self.describe()
        version = wanted.min_version if wanted.pinned is None else wanted.pinned
        later = " or later" if wanted.pinned is None else ""
        known = "; ".join(lines) or f"no replica of {self.chain_url} has a lease"
        return RolloutError(
            f"no replica made {what} by version {version}{later} within {seconds:g} s: {known}. Look after the "
            "replicas, then run again: training resumes from its last checkpoint",
            version=version, replicas=lines,
        )  # fmt: skip

    async def generate(
        self,
        groups: Sequence[Group],
        sampling: Sampling,
        wanted: Wanted,
        progress: Progress | None = None,
        *,
        max_groups: int = 16,
        prefer: str | None = None,
    ) -> Progress:
        """Makes the samples of all groups that `progress` lacks, and waits for replicas as long as that takes.

        Args:
            groups: What to make.
            sampling: How. Its `n` is that of each group.
            wanted: The versions that may answer.
            progress: Is filled in on the way. By default, all groups are to be made.
            max_groups: Groups of one request, at the most, to a replica that takes many.
            prefer: Name of the replica to ask if it is free: it may hold the context in its cache.

        InputError for a request that a replica refuses as it is.
        """
        progress = progress or Progress([None] * len(groups))
        waiting = deque(at for at, samples in enumerate(progress.samples) if samples is None)
        share = max(1, min(max_groups, -(-len(waiting) // max(1, self._num_healthy()))))
        running: dict[_Request, tuple[_Member, list[int], float]] = {}
        try:
            while waiting or running:
                change = self._change
                while waiting and (member := self._free_member(sampling, wanted, prefer)) is not None:
                    picked = _pick(waiting, groups, share if member.offer and member.offer.takes_many else 1)
                    now = time.monotonic()
                    progress.begun_at = progress.begun_at or now
                    running[self._send(member, [groups[at] for at in picked], sampling, wanted)] = member, picked, now
                timeout = self._until_unblocked() if waiting else None
                events: set[asyncio.Future[Any]] = {*running, change}
                await asyncio.wait(events, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                for task in [task for task, (member, *_) in running.items() if task.done() or member.is_lost]:
                    member, picked, begun_at = running.pop(task)
                    task.cancel()
                    if self._take(task, member, picked, begun_at, progress):
                        continue
                    progress.num_retries += 1
                    waiting.extendleft(reversed(picked))
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return progress

    def _until_unblocked(self) -> float | None:
        """Returns the seconds until a replica that failed may be asked again."""
        now = time.monotonic()
        return min((one.blocked_until - now for one in self._members.values() if one.blocked_until > now), default=None)

    def _note_change(self) -> None:
        """Wakes all that wait for a replica."""
        self._change.set_result(None)
        self._change = asyncio.get_running_loop().create_future()

    def _take(
        self,
        task: _Request,
        member: _Member,
        picked: Sequence[int],
        begun_at: float,
        progress: Progress,
    ) -> bool:
        """Takes the samples of a request that has ended. Returns False when it has to be made again."""
        if not task.done():
            return False
        try:
            samples = task.result()
        except (ApplyError, VersionNotServedError) as error:
            self._note_failure(member, error)
            return False
        member.num_failures = 0
        for at, group in zip(picked, samples, strict=True):
            progress.samples[at] = group
        num_samples = sum(map(len, samples))
        progress.answered.append(Answered(member.name, begun_at, time.monotonic(), num_samples))
        return True

    def _send(self, member: _Member, groups: Sequence[Group], sampling: Sampling, wanted: Wanted) -> _Request:
        """Begins a request, which counts from now until its end."""
        assert member.offer is not None
        own = sampling.of_group(groups[0].n)
        num_samples = len(groups) * own.n
        prompts, seeds = [group.prompt_ids for group in groups], [group.seed for group in groups]
        request = asyncio.ensure_future(member.client.generate(member.offer, prompts, seeds, own, wanted))
        member.num_requests += 1
        member.num_samples += num_samples

        def end(_: _Request) -> None:
            member.num_requests -= 1
            member.num_samples -= num_samples
            self._note_change()

        request.add_done_callback(end)
        return request

    def _note_failure(self, member: _Member, error: ApplyError | VersionNotServedError) -> None:
        """Keeps work from a replica for a while: longer after each failure in a row, unless it is just behind."""
        if isinstance(error, VersionNotServedError):
            member.version = error.version
            member.blocked_until = time.monotonic() + _FIRST_PAUSE_SECONDS
        else:
            _logger.warning("a request for samples failed and is made again: %s", error)
            self.num_errors[member.name] = self.num_errors.get(member.name, 0) + 1
            member.last_error = str(error)
            member.num_failures += 1
            pause = backoff_seconds(member.num_failures, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
            member.blocked_until = time.monotonic() + pause
        # Its long poll may wait for a version that it had before: it starts again.
        self._watch(member)

    def _num_healthy(self) -> int:
        return sum(member.offer is not None and member.problem is None for member in self._members.values())

    def _free_member(self, sampling: Sampling, wanted: Wanted, prefer: str | None) -> _Member | None:
        """Returns the free replica with the fewest samples to make; None when none may answer now."""
        members = list(self._members.values())
        free = [
            (member.name != prefer, member.num_samples, (at - self._turn) % len(members), member)
            for at, member in enumerate(members)
            if member.is_free()
            and wanted.takes(member.version)
            and (_is_processed(member.offer) or not sampling.needs_processed_logprobs)
        ]
        return min(free, key=lambda one: one[:3])[3] if free else None

    def _add(self, url: str, *, is_leased: bool) -> None:
        member = self._members[url] = _Member(url, ReplicaClient(url, self._request_seconds), is_leased)
        self._watch(member)

    def _watch(self, member: _Member) -> None:
        if member.task is not None:
            member.task.cancel()
        member.task = asyncio.create_task(self._follow(member))

    async def _look(self, chain: Chain) -> None:
        """Adds replicas that have a lease, and drops those that have none any more and do not answer."""
        while True:
            try:
                await self._meet(await asyncio.to_thread(live_leases, chain))
                self._look_error = None
            except WeightlineError as error:
                self._look_error = str(error)
            except Exception as error:
                _logger.exception("the leases of %s cannot be read", self.chain_url)
                self._look_error = f"{type(error).__name__}: {error}"
            await asyncio.sleep(self._look_seconds)

    async def _meet(self, leases: Sequence[Lease]) -> None:
        urls = {lease.url.rstrip("/"): lease for lease in leases if lease.url is not None}
        trusted = {url for url in urls if is_trusted_url(url)}
        self._distrusted = tuple(
            f"{lease.replica} at {url} is not asked: {REPLICA_HOSTS_VARIABLE} does not allow its host"
            for url, lease in urls.items()
            if url not in trusted
        )
        for url in trusted - self._members.keys():
            self._add(url, is_leased=True)
        for url in self._members.keys() - trusted:
            member = self._members[url]
            if member.offer is None and member.num_requests == 0 and member.task is not None:
                member.task.cancel()
                await member.client.close()
                del self._members[url]

    async def _follow(self, member: _Member) -> None:
        """Keeps a replica's state: by its status first, then by long polls for the version after its own."""
        num_failures = 0
        while True:
            begun = time.monotonic()
            try:
                has_moved = await self._poll(member)
            except WeightlineError as error:
                problem = str(error)
            except Exception as error:
                _logger.exception("the replica at %s cannot be watched", member.url)
                problem = f"{type(error).__name__}: {error}"
            else:
                num_failures, member.is_lost = 0, False
                if has_moved:
                    self._note_change()
                elif time.monotonic() - begun < _LEAST_POLL_SECONDS:
                    await asyncio.sleep(_LEAST_POLL_SECONDS)
                continue
            member.offer, member.problem = None, problem
            num_failures += 1
            member.is_lost = num_failures >= _FAILURES_OF_LOST
            self._note_change()
            await asyncio.sleep(backoff_seconds(num_failures, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))

    async def _poll(self, member: _Member) -> bool:
        """Returns whether the replica serves another version than before, after a wait for it."""
        if member.offer is None:
            self._note_offer(member, await member.client.status())
        at_least = 0 if member.version is None else member.version + 1
        served = await member.client.wait_for(at_least, _POLL_SECONDS)
        before, member.version, member.last_error = member.version, served.version, served.last_error
        return before != served.version

    def _note_offer(self, member: _Member, offer: Offer) -> None:
        member.offer, member.version, member.problem = offer, offer.version, None
        member.last_error = offer.last_error or offer.follow_error
        if not is_same_chain(offer.chain, self.chain_url):
            member.problem = f"it serves another chain, {offer.chain}"
        self._note_change()


def _pick(waiting: deque[int], groups: Sequence[Group], limit: int) -> list[int]:
    """Takes the next groups of one size from those that wait: one at least, `limit` at the most."""
    picked = [waiting.popleft()]
    n = groups[picked[0]].n
    while waiting and groups[waiting[0]].n == n and len(picked) < limit:
        if (len(picked) + 1) * n > _MAX_SAMPLES_OF_REQUEST:
            break
        picked.append(waiting.popleft())
    return picked


def _is_processed(offer: Offer | None) -> bool:
    """Returns whether its logprobs are those of the distribution that tokens are drawn from, as far as it says."""
    return offer is None or offer.logprobs_mode in (None, "processed_logprobs")
