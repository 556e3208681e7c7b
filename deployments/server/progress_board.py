"""A stage's artifacts, which a slow or absent server cannot slow down: a thread writes them, when it gets to it.

Two of them: the percentage, and the page with curves and commits (weightline.runs.stage_page).
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from weightline.launch.names import artifact_key

_INTERVAL_SECONDS = 3.0
_PAGE_SECONDS = 20.0
_LAST_WORD_SECONDS = 3.0

DrawPage = Callable[[], str]


class ProgressBoard:
    """Shows the newest `report`ed percentage in the current flow or task run. Never raises, never blocks a caller.

    `draw_page`, if given, is called on the board's own thread, now and then and at the end.
    """

    def __init__(self, name: str, description: str, draw_page: DrawPage | None = None) -> None:
        self._name = name
        self._description = description
        self._draw_page = draw_page
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
            self._write_until_closed()
        # A picture of the work must never be the end of it, whatever the server, the bucket or Prefect does.
        except Exception:  # noqa: BLE001
            return

    def _write_until_closed(self) -> None:
        key = artifact_key(f"{self._name}-progress")
        artifact_id: Any = create_progress_artifact(self._percent, key=key, description=self._description)
        shown, page = self._percent, ""
        next_page_at = time.monotonic() + _INTERVAL_SECONDS
        is_last = False
        while not is_last:
            is_last = self._is_closing.wait(_INTERVAL_SECONDS)
            if self._percent != shown:
                shown = self._percent
                update_progress_artifact(artifact_id, shown)
            if self._draw_page is not None and (is_last or time.monotonic() >= next_page_at):
                page = self._show_page(self._draw_page(), page)
                next_page_at = time.monotonic() + _PAGE_SECONDS

    def _show_page(self, drawn: str, before: str) -> str:
        """A version of the page for every one that says something new."""
        if drawn != before:
            create_markdown_artifact(drawn, key=artifact_key(self._name), description=self._description)
        return drawn
