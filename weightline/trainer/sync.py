"""A captured state on its way to a version: what ranks and threads hand each other, and the thread that works it off.

Outcomes come in the order of the syncs and are the same on every rank. After a failure, every sync that was captured
before training learned of it is void: it builds on a state that never became a version.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from weightline.chain.write.draft import Draft
from weightline.errors import PublishError
from weightline.format.manifest import AssetRef
from weightline.types import Changes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sync:
    """One captured state. The same on every rank but for `changes` and `failure`."""

    sequence: int
    """Counts this process's syncs from 0."""
    epoch: int
    """Counts failures: a sync captured before one that failed is void."""
    global_step: int
    kind: Literal["anchor", "delta", "revert"]
    changes: tuple[Changes, ...] = ()
    """Of this rank's shards, against the state of the sync before. Empty for an anchor, which reads the baseline."""
    reverts_to: int | None = None
    is_milestone: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    assets: tuple[AssetRef, ...] = ()
    with_anchor: bool = False
    """Also write an anchor of this state. No later sync is captured until it is written."""
    failure: str | None = None
    """Why this rank could not capture its part; then the version is not committed."""


@dataclass(frozen=True, slots=True)
class PayloadPart:
    """A rank's report to rank 0 about its payload. `sha256` is empty when nothing of its partition changed."""

    rank: int
    nbytes: int = 0
    sha256: str = ""
    error: str | None = None
    """Why the rank has no payload up; then the version is not committed."""


def add_parts(draft: Draft, parts: Iterable[PayloadPart]) -> None:
    """Enters the payloads of those ranks that have one."""
    for part in parts:
        if part.sha256:
            draft.add(part.rank, part.nbytes, part.sha256)


@dataclass(frozen=True, slots=True)
class SyncOutcome:
    """What became of a sync: the same on every rank."""

    sequence: int
    version: int
    status: Literal["committed", "failed", "void"]
    reason: str = ""
    is_conflict: bool = False
    """Another writer holds the version: trying again cannot help."""
    wants_anchor: bool = False
    """Late joiners would fetch more than an anchor by now: the next sync should bring one."""
    payload_nbytes: int = 0
    """Bytes of the version's payloads, of all ranks."""


class SyncPublisher:
    """Turns syncs into versions on a thread of its own. Its methods are called by the training thread."""

    def __init__(
        self,
        write: Callable[[Sync], SyncOutcome],
        is_training: Callable[[], bool] = lambda: True,
        on_end: Callable[[bool], object] = lambda is_abandoned: None,
        look_seconds: float = 1.0,
    ) -> None:
        """Starts the thread.

        Args:
            write: Publishes one sync, on the thread.
            is_training: Says whether training still goes on. It is asked while nothing is to be done; when it says no
                twice, the thread ends.
            on_end: Is called last on the thread, whatever ended it, and learns whether it was that training had ended.
            look_seconds: Time between two such questions.
        """
        self._write, self._is_training, self._on_end = write, is_training, on_end
        self._look_seconds = look_seconds
        self._queue: queue.SimpleQueue[Sync | None] = queue.SimpleQueue()
        self._outcomes: list[SyncOutcome] = []
        self._arrived = threading.Condition()
        self._crash: BaseException | None = None
        self._failed_epoch = -1
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._run, name="weightline-publisher", daemon=True)
        self._thread.start()

    def submit(self, sync: Sync) -> None:
        """Hands over a sync. Returns at once; the caller bounds how many are under way."""
        self._queue.put(sync)

    @property
    def num_outcomes(self) -> int:
        """How many syncs are settled on this rank. PublishError when the thread itself broke."""
        with self._arrived:
            self._raise_crash()
            return len(self._outcomes)

    def outcome(self, sequence: int) -> SyncOutcome:
        """Returns what became of a settled sync."""
        with self._arrived:
            return self._outcomes[sequence]

    def wait_for(self, num_outcomes: int) -> None:
        """Blocks until so many syncs are settled on this rank. PublishError when the thread itself broke."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._outcomes) >= num_outcomes or self._crash is not None)
            self._raise_crash()

    def close(self, limit_seconds: float) -> bool:
        """Lets the thread finish what was submitted and end. Safe to repeat. False when it has not within the limit."""
        self._queue.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=limit_seconds)
        return not self._thread.is_alive()

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise PublishError(
                f"the publisher thread broke: {self._crash!r}", reason=repr(self._crash)
            ) from self._crash

    def _run(self) -> None:
        try:
            while (sync := self._next()) is not None:
                outcome = self._settle(sync)
                with self._arrived:
                    self._outcomes.append(outcome)
                    self._arrived.notify_all()
        # Not lost: the training thread raises it at its next sync.
        except BaseException as error:  # noqa: BLE001
            with self._arrived:
                self._crash = error
                self._arrived.notify_all()
        finally:
            # It may hold frames of the training loop, and with them the model.
            self._is_training = lambda: False
            self._on_end(self._is_abandoned)

    def _next(self) -> Sync | None:
        """Returns the next sync; None when the session is closed, or training has left it without closing it."""
        num_misses = 0
        while num_misses < 2:
            try:
                return self._queue.get(timeout=self._look_seconds)
            except queue.Empty:
                num_misses = 0 if self._is_training() else num_misses + 1
        self._is_abandoned = True
        _logger.warning("training has ended with an error: publishing ends, what was committed stays")
        return None

    def _settle(self, sync: Sync) -> SyncOutcome:
        if sync.epoch <= self._failed_epoch:
            return SyncOutcome(sync.sequence, -1, "void", "a sync before it failed")
        outcome = self._write(sync)
        if outcome.status == "failed":
            self._failed_epoch = sync.epoch
        return outcome
