"""Wall-clock time of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def best_of(
    repeats: int, work: Callable[[], Result], before: Callable[[], object] = lambda: None
) -> tuple[float, Result]:
    """(seconds of the fastest run, result of the last). A first run that does not count warms up.

    `before` runs untimed before each run: what makes the next one start from where the first did.
    """
    result = work()
    best_seconds = float("inf")
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        result = work()
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return best_seconds, result
