"""Which version the numbers that training logs belong to: the one of their own step.

transformers logs a step's loss after the step's `on_step_end`, its evaluation after that, and a summary at the end. A
version is captured at `on_step_end`. So its commit may wait for the numbers of its step, and what is logged later is
written as a record beside it. Numbers of steps that become no version stay with the trainer's own log.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from numbers import Real
from typing import Any


class StepMetrics:
    """The numbers of one version. They may be added to until they are final, and the commit waits for that.

    The training thread adds, the publisher's thread waits and reads.
    """

    def __init__(self, values: Mapping[str, float], *, is_final: bool) -> None:
        self._values = dict(values)
        self._final = threading.Event()
        if is_final:
            self._final.set()

    @property
    def is_final(self) -> bool:
        """Whether nothing can be added any more."""
        return self._final.is_set()

    @property
    def values(self) -> dict[str, float]:
        """Returns the numbers, by name."""
        return dict(self._values)

    def finish(self, values: Mapping[str, float] | None = None) -> None:
        """Adds the last numbers and lets the commit go on. Without effect on numbers that are final."""
        if not self._final.is_set():
            self._values.update(values or {})
            self._final.set()

    def wait(self, timeout_seconds: float) -> bool:
        """Blocks until the numbers are final, or the time is over; then returns False."""
        return self._final.wait(timeout_seconds)


class MetricsLog:
    """Sorts what is logged by its step. For the training thread."""

    def __init__(self) -> None:
        self._step = -1
        self._early: dict[str, float] = {}
        self._newest = StepMetrics({}, is_final=True)
        self._newest_step = -1

    def take(self, step: int, given: Mapping[str, float], *, awaits_more: bool) -> StepMetrics:
        """Returns the numbers of a version of this step: those that were logged before it, and the given ones.

        awaits_more: whether the step's own log is still to come.
        """
        self.finish()
        early = self._early if self._step == step else {}
        self._early = {}
        self._newest = StepMetrics({**early, **given}, is_final=not awaits_more)
        self._newest_step = step
        return self._newest

    def stand_at(self, step: int) -> None:
        """Says that the newest version is of this step, and was committed before."""
        self._newest_step = step

    def add(self, step: int, values: Mapping[str, float]) -> bool:
        """Enters numbers of a step. False when its version has its numbers already: they go into a record."""
        if step == self._newest_step:
            is_awaited = not self._newest.is_final
            self._newest.finish(values)
            return is_awaited
        if step != self._step:
            self._step, self._early = step, {}
        self._early.update(values)
        return True

    def drop(self) -> None:
        """Forgets what was logged for steps that have no version yet."""
        self._early = {}

    def finish(self) -> None:
        """Lets the newest version be committed with the numbers that it has."""
        self._newest.finish()


def numbers_in(logs: Mapping[str, Any]) -> dict[str, float]:
    """Returns those entries of a log that are finite numbers."""
    found = ((name, _finite(value)) for name, value in logs.items())
    return {name: value for name, value in found if value is not None}


def _finite(value: Any) -> float | None:
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond all floats
        return None
    return number if math.isfinite(number) else None
