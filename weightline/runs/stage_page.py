"""The page of a stage: how far and how fast it is, its curves, and its commits. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weightline.lineage.rows import LineageRow
from weightline.lineage.table import markdown_table
from weightline.runs.curves import curve_image, points_of

#: What a person looks at, in this order, where the trainer logs it.
CURVES = {
    "loss": "Loss",
    "reward": "Reward",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Preference accuracy",
    "kl": "KL to the reference",
    "entropy": "Entropy",
    "completions/mean_length": "Length of completions",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
}
_MAX_ROWS = 100


@dataclass(slots=True)
class Pace:
    """Optimizer steps by the second, over the last minute that was looked at."""

    window_seconds: float = 60.0
    _seen: list[tuple[float, int]] = field(default_factory=list)

    def saw(self, now_seconds: float, step: int) -> None:
        """`now_seconds` never decreases. A step that went back, after a resume, starts anew."""
        if self._seen and step < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or step > self._seen[-1][1]:
            self._seen.append((now_seconds, step))
        while len(self._seen) > 2 and now_seconds - self._seen[0][0] > self.window_seconds:
            del self._seen[0]

    @property
    def steps_per_second(self) -> float | None:
        """None until two different steps were seen."""
        if len(self._seen) < 2:
            return None
        (start, first), (end, last) = self._seen[0], self._seen[-1]
        return (last - first) / (end - start) if end > start else None


def stage_markdown(
    title: str, step: int, max_steps: int, pace: float | None, history: Iterable[Mapping[str, float]],
    rows: Sequence[LineageRow],
) -> str:  # fmt: skip
    """Headline, curves, and the newest commits of the stage as a table."""
    logged = list(history)
    parts = [f"**{title}**: {headline(step, max_steps, pace)}"]
    images = (curve_image(label, points_of(logged, name)) for name, label in CURVES.items())
    parts += [image for image in images if image]
    if rows:
        parts.append(f"Commits, the newest {min(len(rows), _MAX_ROWS)} of {len(rows)}:")
        parts.append(markdown_table(rows[-_MAX_ROWS:]))
    return "\n\n".join(parts) + "\n"


def headline(step: int, max_steps: int, pace: float | None) -> str:
    """ "step 120 of 250, 2.4 steps/s, 54 s to go"."""
    words = [f"step {step} of {max_steps}"]
    if pace:
        words.append(f"{pace:.2f} steps/s" if pace >= 0.1 else f"{1 / pace:.0f} s/step")
        if step < max_steps:
            words.append(f"{(max_steps - step) / pace:.0f} s to go")
    return ", ".join(words)
