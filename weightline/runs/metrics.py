"""The numbers that a stage logs, read while it writes them."""

from __future__ import annotations

import json
from pathlib import Path

_MAX_HISTORY = 20_000


class MetricsFollower:
    """Follows a stage's metrics.jsonl. Reads only what is new; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.numbers: dict[str, float] = {}
        """The newest value of each metric."""
        self.history: list[dict[str, float]] = []
        """What was logged, oldest first; of much, the newer half. Replaced, never changed: any thread may read it."""

    @property
    def step(self) -> int:
        """The newest optimizer step that was logged."""
        return int(self.numbers.get("step", 0))

    def refresh(self) -> None:
        """Read what came since the last call. A missing file holds nothing; one that shrank is read anew."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:
                    self._offset, self.numbers = 0, {}
                    self.history = []
                file.seek(self._offset)
                fresh = file.read(size - self._offset)
        except FileNotFoundError:
            return
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        logged = [json.loads(line) for line in whole.splitlines()]
        for numbers in logged:
            self.numbers |= numbers
        if logged:
            self.history = [*self.history, *logged][-_MAX_HISTORY:]
