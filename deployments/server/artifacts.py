"""Names artifacts of the Prefect UI, and writes the progress and the page of a training stage.

A `ProgressBoard` writes from a thread of its own, so that a slow or absent server cannot slow training down.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, cast
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact

from weightline.lineage.text import slug

_INTERVAL_SECONDS = 3.0
_PAGE_SECONDS = 20.0
_CLOSE_SECONDS = 3.0

DrawPage = Callable[[], str]

logger = logging.getLogger(__name__)


def artifact_key(text: str) -> str:
    """Returns a key that Prefect accepts: "lineage-My_Chain" -> "lineage-my-chain"."""
    return slug(text)


def lineage_key(chain_name: str) -> str:
    """Returns the key of the artifact that shows a chain's lineage."""
    return artifact_key(f"lineage-{chain_name}")


class ProgressBoard:
    """Writes two artifacts of the current flow or task run: the last `report`ed percentage, and a Markdown page.

    Reporting never raises and never blocks. `draw_page`, if given, is called on the board's own thread, every 20 s and
    once at the end. If writing fails, the board logs a warning and writes nothing more.
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
        """Sets the percentage to `done` of `total`."""
        self._percent = round(100 * min(done / total, 1.0), 1) if total > 0 else 0.0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_closing.set()
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._write_until_closed()
        # The server, the bucket or Prefect may raise anything here, and no such error may end a training.
        except Exception as error:  # noqa: BLE001
            logger.warning("the progress of %s is no longer shown: %r", self._name, error)

    def _write_until_closed(self) -> None:
        key = artifact_key(f"{self._name}-progress")
        # Outside an async context the call has finished and returns the id.
        artifact_id = cast(UUID, create_progress_artifact(self._percent, key=key, description=self._description))
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
        """Writes a new version of the page if it differs from the one before."""
        if drawn != before:
            create_markdown_artifact(drawn, key=artifact_key(self._name), description=self._description)
        return drawn
