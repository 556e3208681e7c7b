"""How tests wait for what other processes and threads do.

The patience is for hosts that are busy with something else: only a test that fails waits so long. What has to be quick
is shown by benchmarks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_SECONDS = 240.0
"""Less than the time limit of a test, so that a wait in vain is told as such."""


def wait_until(
    read: Callable[[], T],
    is_enough: Callable[[T], bool] = bool,
    *,
    meanwhile: Callable[[], object] = lambda: None,
    told: Callable[[], object] = lambda: "",
    pause_seconds: float = 0.5,
) -> T:
    """Returns what `read` returns once that is enough. Fails with what was read last and `told` when patience ends.

    `meanwhile` is called between two reads. The pause between them grows up to `pause_seconds`: a read may be a
    request, and what takes long gets the CPU.
    """
    begun = time.monotonic()
    deadline = begun + PATIENCE_SECONDS
    while not is_enough(found := read()):
        assert time.monotonic() < deadline, f"waited in vain: still {found!r}\n{told()}"
        meanwhile()
        time.sleep(min(pause_seconds, 0.05 + 0.1 * (time.monotonic() - begun)))
    return found
