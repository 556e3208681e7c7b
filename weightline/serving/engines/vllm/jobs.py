"""Work beside an engine's own loop: a call starts it, later calls ask whether it is done.

What an engine's control channel calls, its loop waits for; requests would stand still as long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from weightline.errors import ApplyError
from weightline.serving.engines.vllm.elements import use_all_cpus


class Job:
    """One piece of work on a thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="weightline-job", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        """What the work returned. Raises what it raised; ApplyError while it is under way."""
        if not self.is_done:
            raise ApplyError("the job is still under way")
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        use_all_cpus()
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._error = error
