"""A stage while it trains: how far it is, how fast, and its page. Reads the stage's folder and the bucket."""

from __future__ import annotations

import time

from weightline.lineage.read import read_lineage
from weightline.runs.folder import Run
from weightline.runs.metrics import MetricsFollower
from weightline.runs.stage_page import Pace, stage_markdown
from weightline.stages.job import StageJob

#: Newest versions that a page looks at.
_MAX_SHOWN = 100


class StageWatch:
    """`look` from one thread, `draw_page` from any."""

    def __init__(self, run: Run, job: StageJob) -> None:
        self.title = f"{job.stage.kind} of {run.run_id}"
        self.max_steps = job.stage.max_steps
        self._run = run
        self._stage = (job.stage.kind, run.run_id)
        self._metrics = MetricsFollower(job.metrics_path)
        self._pace = Pace()

    def look(self) -> int:
        """Read what the trainer has logged since; the newest optimizer step."""
        self._metrics.refresh()
        self._pace.saw(time.monotonic(), self._metrics.step)
        return self._metrics.step

    def draw_page(self) -> str:
        """Pace, curves and commits as Markdown."""
        rows = read_lineage(self._run.open_chain(), _MAX_SHOWN)
        own = [row for row in rows if (row.stage, row.run_id) == self._stage]
        metrics, pace = self._metrics, self._pace.steps_per_second
        return stage_markdown(self.title, metrics.step, self.max_steps, pace, metrics.history, own)
