"""Records a rank's publish steps in Prefect on a thread of its own, so that the rank never waits for Prefect."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from weightline.trainer.steps import Step

#: Steps that may wait to be recorded. If more wait, Prefect makes no progress, and further steps are not recorded.
MAX_WAITING = 1000

logger = logging.getLogger(__name__)


class StepRecorder:
    """A `StepObserver` whose thread calls `record(step)` for one step after the other, inside `context()`.

    `record` is called when a step begins and may wait for its end. An error that it raises is logged, unless it is the
    step's own error, which the trainer reports.
    """

    def __init__(
        self,
        context: Callable[[], AbstractContextManager[object]],
        record: Callable[[Step], object],
        max_recorded_ranks: int,
        close_seconds: float = 30.0,
    ) -> None:
        """Starts the thread. `close_seconds` is the longest wait of `close`, which only a busy machine needs."""
        self._context = context
        self._record = record
        self._max_recorded_ranks = max_recorded_ranks
        self._close_seconds = close_seconds
        self._waiting: queue.Queue[Step | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="weightline-recorder", daemon=True)
        self._thread.start()

    def observe(self, step: Step) -> None:
        """Takes a step that begins. Returns at once, whatever Prefect does."""
        if not is_recorded(step.rank, step.world_size, self._max_recorded_ranks):
            return
        try:
            self._waiting.put_nowait(step)
        except queue.Full:
            logger.warning("%s v%d is not recorded: Prefect takes no more steps", step.name, step.version)

    def close(self) -> None:
        """Waits until all steps are recorded, for at most `close_seconds`. Safe to repeat.

        Call it before the interpreter shuts its threads down: Prefect takes no events after that.
        """
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(timeout=self._close_seconds)

    def _run(self) -> None:
        # Prefect may raise anything. Steps and training run on other threads and continue without it.
        try:
            with self._context():
                while (step := self._waiting.get()) is not None:
                    self._record_one(step)
        except Exception as error:  # noqa: BLE001
            logger.warning("Prefect records no steps of this rank: %s: %s", type(error).__name__, error)
            while self._waiting.get() is not None:
                pass

    def _record_one(self, step: Step) -> None:
        try:
            self._record(step)
        except Exception as error:  # noqa: BLE001
            if not step.has_failed:
                logger.warning("Prefect did not record %s v%d: %r", step.name, step.version, error)


def is_recorded(rank: int, world_size: int, max_recorded_ranks: int) -> bool:
    """Returns whether a rank's steps are recorded. Of a large job only rank 0 is, so as not to overload the server."""
    return rank == 0 or world_size <= max_recorded_ranks
