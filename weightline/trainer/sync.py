"""The messages between training thread, publisher thread and ranks, and the publisher thread itself.

Outcomes come in the order of the syncs and are the same on every rank. After a failure, every sync that was captured
before the training thread processed the failure is void, since it builds on a state that never became a version.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from weightline.chain.write.draft import Draft
from weightline.errors import PublishError
from weightline.format.manifest import AssetRef
from weightline.trainer.aside import CallThread
from weightline.trainer.metrics import StepMetrics
from weightline.types import Changes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sync:
    """One captured state. Equal on every rank except for `changes` and `failure`."""

    sequence: int
    """Number of the sync in this process, from 0."""
    epoch: int
    """Number of failures that had been processed at the capture. After a failure all syncs of its epoch are void."""
    global_step: int
    kind: Literal["anchor", "delta", "revert"]
    changes: tuple[Changes, ...] = ()
    """Changes of this rank's shards since the sync before. Empty for an anchor, which reads the baseline."""
    reverts_to: int | None = None
    is_milestone: bool = False
    metrics: StepMetrics = field(default_factory=lambda: StepMetrics({}, is_final=True))
    """Rank 0's count, and rank 0 begins to write when they are final."""
    assets: tuple[AssetRef, ...] = ()
    with_anchor: bool = False
    """True to write an anchor of this state as well. No later sync is captured until it is written."""
    at_start: bool = False
    """True when it leads from the tip to the weights that training starts with."""
    failure: str | None = None
    """Reason of a failed capture on this rank; the version is not committed then."""


@dataclass(frozen=True, slots=True)
class PayloadPart:
    """A rank's report to rank 0 about its payload. `sha256` is empty when nothing of its partition changed."""

    rank: int
    nbytes: int = 0
    sha256: str = ""
    error: str | None = None
    """Reason of a failed upload; the version is not committed then."""


def add_parts(draft: Draft, parts: Iterable[PayloadPart]) -> None:
    """Adds the payloads of those ranks that have one to the draft."""
    for part in parts:
        if part.sha256:
            draft.add(part.rank, part.nbytes, part.sha256)


@dataclass(frozen=True, slots=True)
class SyncOutcome:
    """The result of a sync. Equal on every rank."""

    sequence: int
    version: int
    status: Literal["committed", "failed", "void"]
    reason: str = ""
    is_conflict: bool = False
    """True when another writer committed the version, so that a retry cannot succeed."""
    wants_anchor: bool = False
    """True when the next sync should write an anchor, since deltas cost new readers more time by now."""
    payload_nbytes: int = 0
    """Bytes of the version's payloads, of all ranks."""
    commit_id: str = ""


class SyncPublisher:
    """Publishes syncs as versions on a thread of its own. The training thread calls its methods."""

    def __init__(
        self,
        write: Callable[[Sync], SyncOutcome],
        is_training: Callable[[], bool] = lambda: True,
        on_end: Callable[[bool], object] = lambda is_abandoned: None,
        look_seconds: float = 1.0,
        *,
        awaits_metrics: bool = True,
    ) -> None:
        """Starts the thread.

        Args:
            write: Publishes one sync, on the thread.
            is_training: Returns whether training still runs. The thread calls it while it is idle, and ends when it
                returns False twice.
            on_end: Called last on the thread, however it ends, with True when it ended because of `is_training`.
            look_seconds: Time between two calls of `is_training`.
            awaits_metrics: Whether a sync is held back until its metrics are final.
        """
        self._write, self._is_training, self._on_end = write, is_training, on_end
        self._look_seconds, self._awaits_metrics = look_seconds, awaits_metrics
        self._queue: queue.SimpleQueue[Sync | Callable[[], object] | None] = queue.SimpleQueue()
        self._outcomes: list[SyncOutcome] = []
        self._calls = CallThread("weightline-records")
        self._arrived = threading.Condition()
        self._crash: BaseException | None = None
        self._failed_epoch = -1
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name="weightline-publisher", daemon=True)
        self._thread.start()

    def submit(self, sync: Sync) -> None:
        """Queues a sync. Returns at once; the caller bounds the number of queued syncs."""
        self._queue.put(sync)

    def call(self, work: Callable[[], object]) -> None:
        """Does `work` once all that was submitted before is settled. It must raise nothing, and delays no sync."""
        self._queue.put(work)

    @property
    def is_training(self) -> bool:
        """Whether training still goes on, as far as this process can see."""
        return self._is_training()

    @property
    def num_outcomes(self) -> int:
        """Returns the number of syncs that are settled on this rank. PublishError when the thread crashed."""
        with self._arrived:
            self._raise_crash()
            return len(self._outcomes)

    def outcome(self, sequence: int) -> SyncOutcome:
        """Returns the outcome of a settled sync."""
        with self._arrived:
            return self._outcomes[sequence]

    def wait_for(self, num_outcomes: int) -> None:
        """Blocks until `num_outcomes` syncs are settled on this rank. PublishError when the thread crashed."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._outcomes) >= num_outcomes or self._crash is not None)
            self._raise_crash()

    def close(self, limit_seconds: float) -> bool:
        """Ends the thread after all queued syncs and calls. Returns whether the syncs ended within the limit.

        Calls that take longer are logged. Safe to repeat.
        """
        self._queue.put(None)
        if threading.current_thread() is self._thread:
            return False
        deadline = time.monotonic() + limit_seconds
        self._thread.join(timeout=limit_seconds)
        is_ended = not self._thread.is_alive()
        if is_ended and not self._calls.close(max(0.0, deadline - time.monotonic())):
            _logger.warning("records beside the last versions were not written within %g s", limit_seconds)
        return is_ended

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise PublishError(
                f"the publisher thread crashed: {self._crash!r}", reason=repr(self._crash)
            ) from self._crash

    def _run(self) -> None:
        try:
            while (task := self._next()) is not None:
                if not isinstance(task, Sync):
                    self._calls.call(task)
                    continue
                outcome = self._settle(task)
                with self._arrived:
                    self._outcomes.append(outcome)
                    self._arrived.notify_all()
        # The training thread raises the error at its next sync.
        except BaseException as error:  # noqa: BLE001
            with self._arrived:
                self._crash = error
                self._arrived.notify_all()
        finally:
            # The function may refer to frames of the training loop, and so keep the model alive.
            self._is_training = lambda: False
            self._on_end(self._is_abandoned)

    def _next(self) -> Sync | Callable[[], object] | None:
        """Returns what comes next; None when the session is closed, or training has left it without closing it."""
        found: list[Sync | Callable[[], object] | None] = []

        def has_come() -> bool:
            try:
                found.append(self._queue.get(timeout=self._look_seconds))
            except queue.Empty:
                return False
            return True

        if self._while_training(has_come):
            return found[0]
        self._is_abandoned = True
        _logger.warning("training has ended with an error: publishing ends; committed versions stay")
        return None

    def _while_training(self, has_come: Callable[[], bool]) -> bool:
        """Asks `has_come`, which takes its time, until it says yes. False when training ended before."""
        num_misses = 0
        while num_misses < 2:
            if has_come():
                return True
            num_misses = 0 if self._is_training() else num_misses + 1
        return False

    def _settle(self, sync: Sync) -> SyncOutcome:
        if sync.epoch <= self._failed_epoch:
            return SyncOutcome(sync.sequence, -1, "void", "an earlier sync failed")
        if self._awaits_metrics:
            self._while_training(lambda: sync.metrics.wait(self._look_seconds))
        outcome = self._write(sync)
        if outcome.status == "failed":
            self._failed_epoch = sync.epoch
        return outcome
