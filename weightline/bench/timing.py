"""Measures the wall-clock time of a function."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def best_of(
    repeats: int, work: Callable[[], Result], before: Callable[[], object] = lambda: None
) -> tuple[float, Result]:
    """Returns (seconds of the fastest run, result of the last). A first run, which is not counted, warms up.

    `before` runs untimed before each run, to restore the initial state.
    """
    result = work()
    best_seconds = float("inf")
    for _ in range(repeats):
        before()
        start = time.perf_counter()
        result = work()
        best_seconds = min(best_seconds, time.perf_counter() - start)
    return best_seconds, result
