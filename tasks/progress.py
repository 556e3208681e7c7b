"""A progress artifact that a slow or absent Prefect server cannot slow down: a thread writes it, when it gets to it."""

from __future__ import annotations

import contextvars
import threading
from types import TracebackType
from typing import Any, Self

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from tasks.names import artifact_key

_INTERVAL_SECONDS = 3.0
_LAST_WORD_SECONDS = 2.0


class ProgressBoard:
    """Shows the newest `report`ed percentage in the current flow or task run. Never raises, never blocks a caller."""

    def __init__(self, name: str, description: str) -> None:
        self._key = artifact_key(f"{name}-progress")
        self._description = description
        self._percent = 0.0
        self._is_closing = threading.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="weightline-progress", daemon=True)

    def report(self, done: float, total: float) -> None:
        """`done` of `total` is done."""
        self._percent = round(100 * min(done / total, 1.0), 1) if total > 0 else 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closing.set()
        self._thread.join(timeout=_LAST_WORD_SECONDS)

    def _run(self) -> None:
        try:
            artifact_id: Any = create_progress_artifact(self._percent, key=self._key, description=self._description)
            shown = self._percent
            is_last = False
            while not is_last:
                is_last = self._is_closing.wait(_INTERVAL_SECONDS)
                if self._percent != shown:
                    shown = self._percent
                    update_progress_artifact(artifact_id, shown)
        # A picture of the work must never be the end of it, whatever the server or Prefect does.
        except Exception:  # noqa: BLE001
            return
