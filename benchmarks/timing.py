"""CPU time of the calling thread: on a shared machine it repeats, where wall time does not. Wall time for transfers."""

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
    """(thread CPU seconds of the cheapest run, result of the last). A first run that does not count warms up.

    `before` runs untimed before each run: what makes the next one start from where the first did.
    """
    result, least = work(), float("inf")
    for _ in range(repeats):
        before()
        start = time.thread_time()
        result = work()
        least = min(least, time.thread_time() - start)
    return least, result


def memcmp_cpu_seconds(state_N: BitsArray) -> float:
    """The C library compares a state with an equal copy of it: the floor of any capture."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    copy_N = state_N.copy()
    return least_cpu_seconds(lambda: memcmp(state_N.ctypes.data, copy_N.ctypes.data, state_N.nbytes))[0]


def wall_seconds(work: Callable[[], object]) -> float:
    """One run, no warm-up."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
