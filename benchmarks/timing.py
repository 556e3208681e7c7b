"""Times work: by CPU time of the thread, which is reproducible on a shared machine, and transfers by wall time."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import TypeVar

from weightline.types import BitsArray

Result = TypeVar("Result")


def least_cpu_seconds(
    work: Callable[[], Result], repeats: int = 5, before: Callable[[], object] = lambda: None
) -> tuple[float, Result]:
    """Returns (least thread CPU seconds of the runs, result of the last). An untimed first run warms up.

    `before` runs untimed before each run, and restores the state in which the first one started.
    """
    result, least = work(), float("inf")
    for _ in range(repeats):
        before()
        start = time.thread_time()
        result = work()
        least = min(least, time.thread_time() - start)
    return least, result


def memcmp_cpu_seconds(state_N: BitsArray) -> float:
    """Returns the seconds in which the C library compares a state with an equal copy: a lower bound of a capture."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    copy_N = state_N.copy()
    return least_cpu_seconds(lambda: memcmp(state_N.ctypes.data, copy_N.ctypes.data, state_N.nbytes))[0]


def wall_seconds(work: Callable[[], object]) -> float:
    """Returns the wall seconds of one run without warm-up."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
