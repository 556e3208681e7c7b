"""The page of a stage in the Prefect UI: its step and pace, its curves, and its commits."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weightline.lineage.read import read_lineage
from weightline.lineage.rows import LineageRow
from weightline.lineage.samples import newest_samples, samples_markdown
from weightline.lineage.table import markdown_table
from weightline.rollouts.record import SamplesRecord
from weightline.runs.curves import curve_image, points_of
from weightline.runs.folder import Run
from weightline.runs.progress import MetricsFollower
from weightline.stages.job import StageJob

#: Curves that the page shows if the trainer logs them, in this order: metric -> title.
CURVES = {
    "loss": "Loss",
    "reward": "Reward",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Preference accuracy",
    "kl": "KL to the reference",
    "entropy": "Entropy",
    "completions/mean_length": "Length of completions",
    "rollout/staleness_mean": "Staleness of samples, mean in versions",
    "rollout/staleness_max": "Staleness of samples, largest in versions",
    "rollout/wait_seconds": "Wait for samples in seconds",
    "rollout/queue_length": "Batches queued",
    "sampling/importance_sampling_ratio/mean": "Importance sampling ratio, mean",
    "sampling/sampling_logp_difference/max": "Difference of log probabilities, largest",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
_MAX_ROWS = 100
#: The newest version has no record of its samples yet while it is being committed.
_NUM_LOOKED_AT = 3


class StageWatch:
    """Follows a stage while it trains, from its folder and the bucket. `look` from one thread, `draw_page` from any."""

    def __init__(self, run: Run, job: StageJob) -> None:
        self.title = f"{job.stage.kind} of {run.run_id}"
        self.max_steps = job.stage.max_steps
        self._run = run
        self._stage = (job.stage.kind, run.run_id)
        self._has_rollouts = job.stage.rollouts is not None
        self._metrics = MetricsFollower(job.metrics_path)
        self._pace = Pace()

    def look(self) -> int:
        """Reads the metrics logged since the last call. Returns the newest optimizer step."""
        self._metrics.refresh()
        self._pace.observe(time.monotonic(), self._metrics.step)
        return self._metrics.step

    def draw_page(self) -> str:
        """Returns the page as Markdown."""
        chain = self._run.open_chain()
        rows = read_lineage(chain, _MAX_ROWS)
        own = [row for row in rows if (row.stage, row.run_id) == self._stage]
        metrics, pace = self._metrics, self._pace.steps_per_second
        samples = None
        if self._has_rollouts:
            samples = newest_samples(chain, [row.version for row in own[-_NUM_LOOKED_AT:][::-1]])
        return stage_markdown(self.title, metrics.step, self.max_steps, pace, metrics.history, own, samples)


@dataclass(slots=True)
class Pace:
    """Optimizer steps per second over the last minute."""

    window_seconds: float = 60.0
    _seen: list[tuple[float, int]] = field(default_factory=list)

    def observe(self, now_seconds: float, step: int) -> None:
        """Adds the step. `now_seconds` must never decrease. A lower step, after a resume, starts the window again."""
        if self._seen and step < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or step > self._seen[-1][1]:
            self._seen.append((now_seconds, step))
        while len(self._seen) > 2 and now_seconds - self._seen[0][0] > self.window_seconds:
            del self._seen[0]

    @property
    def steps_per_second(self) -> float | None:
        """Returns the optimizer steps per second; None until two different steps were observed."""
        if len(self._seen) < 2:
            return None
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start) if end > start else None


def stage_markdown(
    title: str, step: int, max_steps: int, pace: float | None, history: Iterable[Mapping[str, float]],
    rows: Sequence[LineageRow], samples: tuple[int, SamplesRecord] | None = None,
) -> str:  # fmt: skip
    """Returns the headline, the curves, the samples of one version, and a table of the stage's newest commits. Pure."""
    logged = list(history)
    parts = [f"**{title}**: {headline(step, max_steps, pace)}"]
    images = (curve_image(label, points_of(logged, name)) for name, label in CURVES.items())
    parts += [image for image in images if image]
    if samples is not None:
        parts.append(samples_markdown(*samples))
    if rows:
        parts.append(f"Commits, the newest {min(len(rows), _MAX_ROWS)} of {len(rows)}:")
        parts.append(markdown_table(rows[-_MAX_ROWS:]))
    return "\n\n".join(parts) + "\n"


def headline(step: int, max_steps: int, pace: float | None) -> str:
    """Returns "step 120 of 250, 2.4 steps/s, 54 s to go". Pure."""
    words = [f"step {step} of {max_steps}"]
    if pace:
        words.append(f"{pace:.2f} steps/s" if pace >= 0.1 else f"{1 / pace:.0f} s/step")
        if step < max_steps:
            words.append(f"{(max_steps - step) / pace:.0f} s to go")
    return ", ".join(words)
