"""The background thread that turns captured syncs into versions while training goes on.

Outcomes come in the order of the syncs and are the same on every rank. After a failure, every sync that was captured
before training learned of it is void: it builds on a state that never became a version.
"""

from __future__ import annotations

import queue
import threading

from weightline.errors import PublishError
from weightline.trainer.sync import Outcome, Sync
from weightline.trainer.writer import VersionWriter


class Publisher:
    """Owns the thread. `submit`, `num_outcomes`, `wait_for` and `close` are called by the training thread."""

    def __init__(self, writer: VersionWriter) -> None:
        self._writer = writer
        self._queue: queue.SimpleQueue[Sync | None] = queue.SimpleQueue()
        self._outcomes: list[Outcome] = []
        self._arrived = threading.Condition()
        self._crash: BaseException | None = None
        self._failed_epoch = -1
        self._thread = threading.Thread(target=self._run, name="weightline-publisher", daemon=True)
        self._thread.start()

    def submit(self, sync: Sync) -> None:
        """Hand over a sync. Returns at once; the caller bounds how many are under way."""
        self._queue.put(sync)

    @property
    def num_outcomes(self) -> int:
        """How many syncs are settled on this rank. PublishError when the thread itself broke."""
        with self._arrived:
            self._raise_crash()
            return len(self._outcomes)

    def outcome(self, sequence: int) -> Outcome:
        """What became of a settled sync."""
        with self._arrived:
            return self._outcomes[sequence]

    def wait_for(self, num_outcomes: int) -> None:
        """Block until so many syncs are settled on this rank."""
        with self._arrived:
            self._arrived.wait_for(lambda: len(self._outcomes) >= num_outcomes or self._crash is not None)
            self._raise_crash()

    def close(self) -> None:
        """Settle what was submitted, then end the thread. Safe to repeat."""
        self._queue.put(None)
        self._thread.join()

    def _raise_crash(self) -> None:
        if self._crash is not None:
            raise PublishError(
                f"the publisher thread broke: {self._crash!r}", reason=repr(self._crash)
            ) from self._crash

    def _run(self) -> None:
        try:
            while (sync := self._queue.get()) is not None:
                outcome = self._settle(sync)
                with self._arrived:
                    self._outcomes.append(outcome)
                    self._arrived.notify_all()
        # The one policy beside training: whatever broke here is raised by the training thread at its next sync.
        except BaseException as error:  # noqa: BLE001
            with self._arrived:
                self._crash = error
                self._arrived.notify_all()

    def _settle(self, sync: Sync) -> Outcome:
        if sync.epoch <= self._failed_epoch:
            return Outcome(sync.sequence, -1, "void", "a sync before it failed")
        outcome = self._writer.write(sync)
        if outcome.status == "failed":
            self._failed_epoch = sync.epoch
        return outcome
