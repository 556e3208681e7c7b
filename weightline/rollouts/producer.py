"""A rank's queue of generation batches: made ahead on a thread of its own, taken by training when it needs them.

Batch k is requested with the prompts that training will ask for, and taken with the same ones: the order of prompts is
training's own. A sample that has become stale in between is made again, with its whole group, so that no prompt is
dropped or doubled. Seeds depend on the run's seed, the rank, the batch and the group only: the same versions give the
same samples.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from weightline.errors import InputError, RolloutError
from weightline.rollouts.batch import Batch, ReplicaShare, Taken, batch_of, restored, state_of, with_errors
from weightline.rollouts.client import Wanted
from weightline.rollouts.episode import Play, Session, play_episode
from weightline.rollouts.fleet import Group, Progress, ReplicaFleet
from weightline.rollouts.sample import Sample
from weightline.rollouts.sampling import Sampling, seed_of
from weightline.serving.http.client import backoff_seconds

_logger = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.5, 15.0
#: A group that is stale once more was asked for with a version that is too early: no number of tries mends that.
_MAX_REGENERATIONS = 3
_CLOSE_SECONDS = 10.0


class Producer:
    """Makes batches ahead. One a rank; all methods are called by its training thread."""

    def __init__(
        self,
        fleet: ReplicaFleet,
        sampling: Sampling,
        *,
        seed: int = 0,
        rank: int = 0,
        max_batches: int = 2,
        deadline_seconds: float = 600.0,
        groups_per_request: int = 16,
        play: Play | None = None,
        max_episodes: int = 64,
        max_attempts: int = 7,
    ) -> None:
        """Starts the thread, which begins to look for replicas.

        Args:
            fleet: The replicas. The producer starts and closes it.
            sampling: How samples are drawn. A group of prompts has at most `n` rows.
            seed: The run's seed.
            rank: This rank, which draws samples of its own.
            max_batches: Batches that may be requested and not taken.
            deadline_seconds: How long training waits for one batch, before a RolloutError names every replica.
            groups_per_request: Groups that one request holds, at the most.
            play: A rollout function: each row is an episode that it plays. See `weightline.rollouts.episode`.
            max_episodes: Episodes that are played at a time.
            max_attempts: How often an episode is begun when its function fails.
        """
        if max_batches < 1 or deadline_seconds <= 0 or max_episodes < 1 or max_attempts < 1:
            raise InputError("a producer needs room for one batch, one episode, one attempt and a time above 0")
        self._fleet, self._sampling, self._seed, self._rank = fleet, sampling, seed, rank
        self._max_batches, self._deadline_seconds = max_batches, deadline_seconds
        self._groups_per_request, self._play, self._max_attempts = groups_per_request, play, max_attempts
        self._batches: dict[int, Batch] = {}
        self._shares: dict[str, ReplicaShare] = {}
        self._is_closed = False
        self._loop = asyncio.new_event_loop()
        self._episodes = asyncio.Semaphore(max_episodes)
        self._thread = threading.Thread(target=self._loop.run_forever, name="weightline-rollouts", daemon=True)
        self._thread.start()
        self._submit(self._fleet.start()).result()

    def request(self, k: int, prompts: Sequence[Any], min_version: int) -> None:
        """Begins batch `k` with a row for each prompt, by versions from `min_version` on. Safe to repeat.

        Prompts are token ids, of which equal ones in a row are one group, or any JSON values for a rollout function.
        InputError when too many batches wait, and for other prompts than those that batch `k` was requested with.
        """
        self._requested(k, prompts, min_version)

    def take(
        self,
        k: int,
        prompts: Sequence[Any],
        is_fresh: Callable[[Sample], bool] = lambda sample: True,
        min_version: int = 0,
    ) -> Taken:
        """Returns the samples of batch `k`, one for each prompt, and forgets the batch. Requests it if need be.

        Groups with a sample for which `is_fresh` is False are made again, by versions from `min_version` on.
        RolloutError after the deadline; the error of the rollout function; InputError as in `request`.
        """
        begun = time.monotonic()
        batch = self._requested(k, prompts, min_version)
        try:
            self._wait(batch, begun)
            num_regenerated = self._freshen(batch, is_fresh, min_version, begun)
        finally:
            self._batches.pop(k, None)
        return self._taken(batch, time.monotonic() - begun, num_regenerated)

    def generate(
        self, prompts: Sequence[Any], *, min_version: int, key: str, sampling: Sampling | None = None
    ) -> Taken:
        """Returns samples at once, as for an evaluation, without the queue. `key` names their seeds."""
        begun = time.monotonic()
        batch = batch_of(key, prompts, min_version, sampling or self._sampling, is_tokens=self._play is None)
        self._begin(batch, min_version)
        self._wait(batch, begun)
        return self._taken(batch, time.monotonic() - begun, 0)

    @property
    def queue_length(self) -> int:
        """Batches that are requested, or restored, and not taken."""
        return len(self._batches)

    def shares(self) -> Mapping[str, ReplicaShare]:
        """Returns what each replica has done since the start."""
        return with_errors(self._shares, self._fleet.num_errors)

    def describe(self) -> tuple[str, ...]:
        """Returns a line for each replica."""
        return self._fleet.describe()

    def snapshot(self, wait_seconds: float = 60.0) -> dict[str, Any]:
        """Returns all batches that are not taken, as JSON values for a checkpoint.

        Waits first for those that replicas work on. Of one that is not done by then, as of one that waits for a
        version, the finished groups are kept, and the others are made after `restore`.
        """
        begun = [one.future for one in self._batches.values() if one.future and one.progress.begun_at is not None]
        concurrent.futures.wait(begun, wait_seconds)

        async def read() -> dict[str, Any]:
            return state_of(self._batches.values())

        return self._submit(read()).result()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over the batches of a snapshot. What they lack is made once they are requested.

        InputError for a state that is no snapshot of such a producer.
        """
        for batch in restored(state, self._sampling, is_tokens=self._play is None):
            self._batches[int(batch.key)] = batch

    def close(self) -> None:
        """Ends the thread and all connections. Safe to repeat."""
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        self._thread.join(_CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _requested(self, k: int, prompts: Sequence[Any], min_version: int) -> Batch:
        new = batch_of(str(k), prompts, min_version, self._sampling, is_tokens=self._play is None)
        held = self._batches.get(k)
        if held is not None and held.prompts != new.prompts:
            if held.future is not None:
                raise InputError(f"batch {k} was requested with other prompts", field="prompts")
            _logger.warning("batch %d of the checkpoint has other prompts than training asks for: it is made anew", k)
            held = None
        if held is None:
            if k not in self._batches and len(self._batches) >= self._max_batches:
                waiting = ", ".join(str(one) for one in sorted(self._batches))
                raise InputError(f"batch {k} is one too many: batches {waiting} are not taken yet", field="k")
            held = self._batches[k] = new
        if held.future is None:
            self._begin(held, min_version)
        return held

    def _begin(self, batch: Batch, min_version: int) -> None:
        batch.min_version, batch.asked_at = min_version, time.monotonic()
        batch.future = self._submit(self._make(batch, self._wanted(min_version), attempt=0))

    def _freshen(self, batch: Batch, is_fresh: Callable[[Sample], bool], min_version: int, begun: float) -> int:
        """Makes stale groups again. Returns the number of samples that were replaced."""
        num_regenerated = 0
        for attempt in range(1, _MAX_REGENERATIONS + 1):
            stale = batch.groups_with(lambda sample: not is_fresh(sample))
            if not stale:
                return num_regenerated
            num_regenerated += sum(len(batch.rows[at]) for at in stale)
            batch.forget(stale)
            batch.min_version = min_version
            batch.future = self._submit(self._make(batch, self._wanted(min_version), attempt))
            self._wait(batch, begun)
        if batch.groups_with(lambda sample: not is_fresh(sample)):
            raise RolloutError(
                f"batch {batch.key} was made {_MAX_REGENERATIONS} times by versions from {min_version} on, and is "
                "still stale: the chain's newest version is later than the trainer's own",
                version=min_version, replicas=self.describe(),
            )  # fmt: skip
        return num_regenerated

    def _wait(self, batch: Batch, begun: float) -> None:
        assert batch.future is not None
        left = begun + self._deadline_seconds - time.monotonic()
        done, _ = concurrent.futures.wait([batch.future], max(0.0, left))
        if not done:
            batch.future.cancel()
            what = f"{batch.num_missing} of {batch.num_rows} samples of batch {batch.key}"
            raise self._fleet.error(self._wanted(batch.min_version), what, self._deadline_seconds)
        batch.future.result()

    def _taken(self, batch: Batch, wait_seconds: float, num_regenerated: int) -> Taken:
        found = batch.taken(wait_seconds, num_regenerated, len(self._batches))
        for name, share in found.replicas.items():
            self._shares[name] = self._shares.get(name, ReplicaShare()).plus(share)
        return found

    def _wanted(self, min_version: int) -> Wanted:
        return Wanted(min_version, mixing=self._fleet.mixing)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._is_closed:
            work.close()
            raise RolloutError("the producer of samples is closed: training has ended")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _make(self, batch: Batch, wanted: Wanted, attempt: int) -> None:
        sampling, key = batch.sampling, (self._seed, self._rank, batch.key)
        seeds = [seed_of(*key, at, attempt) for at in range(len(batch.rows))]
        if self._play is not None:
            missing = [at for at, samples in enumerate(batch.progress.samples) if samples is None]
            await _all(self._play_one(self._play, batch, at, seeds[at], wanted) for at in missing)
            return
        groups = [
            Group(tuple(batch.prompts[rows[0]]), len(rows), seed) for rows, seed in zip(batch.rows, seeds, strict=True)
        ]
        await self._fleet.generate(groups, sampling, wanted, batch.progress, max_groups=self._groups_per_request)

    async def _play_one(self, play: Play, batch: Batch, at: int, seed: int, wanted: Wanted) -> None:
        """Makes one row by the rollout function, which is begun again after an error: its environment may be back."""

        async def source(prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, prefer: str | None) -> Sample:
            made = Progress([None])
            try:
                await self._fleet.generate([Group(prompt_ids, 1, seed)], sampling, wanted, made, prefer=prefer)
            finally:
                batch.progress.add(made)
            (samples,) = made.samples
            assert samples is not None
            return samples[0]

        async with self._episodes:
            for attempt in range(self._max_attempts):
                session = Session(source, batch.sampling, seed)
                try:
                    sample = await play_episode(play, session, batch.prompts[batch.rows[at][0]])
                    break
                except (InputError, RolloutError):
                    raise
                except Exception as error:
                    if attempt + 1 == self._max_attempts:
                        raise RolloutError(
                            f"the rollout function failed {attempt + 1} times on row {at} of batch {batch.key}: "
                            f"{type(error).__name__}: {error}",
                            reason=f"{type(error).__name__}: {error}",
                        ) from error
                    _logger.warning("the rollout function failed, and is called again: %r", error)
                    batch.progress.num_retries += 1
                await asyncio.sleep(backoff_seconds(attempt + 1, _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS))
        batch.progress.samples[at] = (sample,)

    async def _end(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fleet.close()
        self._loop.call_soon(self._loop.stop)


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Does all work at the same time. The first error ends the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
