"""The numbers that a stage logs, read while it writes them."""

from __future__ import annotations

import json
from pathlib import Path


class MetricsFollower:
    """Follows a stage's metrics.jsonl. Reads only what is new; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.numbers: dict[str, float] = {}
        """The newest value of each metric."""

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
                file.seek(self._offset)
                fresh = file.read(size - self._offset)
        except FileNotFoundError:
            return
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self.numbers |= json.loads(line)
