"""How far a run is, from its folder and its bucket alone: what the progress bars of a terminal show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightline.chain import Chain
from weightline.lineage.read import read_lineage
from weightline.lineage.rows import LineageRow, is_settled
from weightline.runs.folder import Run
from weightline.runs.metrics import MetricsFollower


@dataclass(frozen=True, slots=True)
class StageProgress:
    """One stage. `numbers` holds the newest of what the trainer logs."""

    kind: str
    step: int
    max_steps: int
    numbers: Mapping[str, float]

    @property
    def headline(self) -> str:
        """The number that a person looks at: the reward where there is one, else the loss."""
        for name in ("reward", "loss"):
            if name in self.numbers:
                return f"{name} {self.numbers[name]:.3f}"
        return ""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """A moment of a run."""

    stages: tuple[StageProgress, ...]
    rows: tuple[LineageRow, ...]

    @property
    def num_versions(self) -> int:
        return len(self.rows)

    @property
    def num_evaluated(self) -> int:
        """Versions with a word on their evaluation, be it `skipped`."""
        return sum(row.evaluation != "waiting" for row in self.rows)

    @property
    def num_served(self) -> int:
        """Versions with a word on their serving, be it `skipped`."""
        return sum(row.serving != "waiting" for row in self.rows)

    @property
    def unsettled(self) -> tuple[int, ...]:
        """Versions that are owed a word on either."""
        return tuple(row.version for row in self.rows if not is_settled(row))

    @property
    def newest_score(self) -> float | None:
        return next((row.score for row in reversed(self.rows) if row.score is not None), None)


class RunWatch:
    """Looks at a run again and again; each look reads only what may have changed."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._chain: Chain = run.open_chain()
        self._metrics = {stage.kind: MetricsFollower(run.job(stage.kind).metrics_path) for stage in run.recipe.stages}

    def look(self) -> RunProgress:
        """The run as it is now."""
        stages = []
        for stage in self._run.recipe.stages:
            metrics = self._metrics[stage.kind]
            metrics.refresh()
            stages.append(StageProgress(stage.kind, metrics.step, stage.max_steps, metrics.numbers))
        return RunProgress(tuple(stages), read_lineage(self._chain))
