"""Reads the progress of a run from its folder and its bucket, for the progress bars of a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.lineage.read import read_lineage
from weightline.lineage.rows import LineageRow, is_settled
from weightline.runs.folder import Run

_MAX_HISTORY = 20_000


class MetricsFollower:
    """Follows a stage's metrics.jsonl. Each refresh reads only new lines, and leaves an incomplete last line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.numbers: dict[str, float] = {}
        """The newest value of each metric."""
        self.history: list[dict[str, float]] = []
        """The newest 20,000 logged lines, oldest first. The list is replaced, never changed, for readers in threads."""

    @property
    def step(self) -> int:
        """Returns the newest optimizer step that was logged."""
        return int(self.numbers.get("step", 0))

    def refresh(self) -> None:
        """Reads the lines added since the last call. A missing file has none; one that shrank is read again."""
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


@dataclass(frozen=True, slots=True)
class StageProgress:
    """The progress of one stage. `numbers` holds the newest value of each metric."""

    kind: str
    step: int
    max_steps: int
    numbers: Mapping[str, float]

    @property
    def headline(self) -> str:
        """Returns the reward if the trainer logs one, else the loss, as in "loss 1.500"."""
        for name in ("reward", "loss"):
            if name in self.numbers:
                return f"{name} {self.numbers[name]:.3f}"
        return ""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """The state of a run at one moment."""

    stages: tuple[StageProgress, ...]
    rows: tuple[LineageRow, ...]

    @property
    def num_versions(self) -> int:
        return len(self.rows)

    @property
    def num_evaluated(self) -> int:
        """Returns the number of versions that have an evaluation record, of any status."""
        return sum(row.evaluation != "waiting" for row in self.rows)

    @property
    def num_served(self) -> int:
        """Returns the number of versions that have a refresh record, of any status."""
        return sum(row.serving != "waiting" for row in self.rows)

    @property
    def unsettled(self) -> tuple[int, ...]:
        """Returns the versions that lack an evaluation record or a refresh record."""
        return tuple(row.version for row in self.rows if not is_settled(row))

    @property
    def newest_score(self) -> float | None:
        return next((row.score for row in reversed(self.rows) if row.score is not None), None)


class RunWatch:
    """Reads the state of a run repeatedly. Each call of `look` reads only new lines of metrics."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._chain: Chain = run.open_chain()
        self._metrics = {stage.kind: MetricsFollower(run.job(stage.kind).metrics_path) for stage in run.recipe.stages}

    def look(self) -> RunProgress:
        """Returns the run's present progress."""
        stages = []
        for stage in self._run.recipe.stages:
            metrics = self._metrics[stage.kind]
            metrics.refresh()
            stages.append(StageProgress(stage.kind, metrics.step, stage.max_steps, metrics.numbers))
        return RunProgress(tuple(stages), read_lineage(self._chain))
