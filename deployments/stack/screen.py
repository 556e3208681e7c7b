"""A run on a terminal: a bar a stage and one for its versions. Where there is no terminal, a line now and then."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from weightline.runs.folder import Run
from weightline.runs.progress import RunProgress

_LINE_SECONDS = 15.0


class RunScreen:
    """Shows `RunProgress` after `RunProgress`."""

    def __init__(self, console: Console, run: Run) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {
            stage.kind: self._progress.add_task(stage.kind, total=stage.max_steps, start=False, note="")
            for stage in run.recipe.stages
        }
        self._versions = self._progress.add_task("evaluated", total=None, note="")
        self._next_line_at = 0.0
        self._last_line = ""

    def show(self, moment: RunProgress) -> None:
        """Draw, or print a line if that is due and says something new."""
        for stage in moment.stages:
            bar = self._bars[stage.kind]
            if stage.step and not self._progress.tasks[bar].started:
                self._progress.start_task(bar)
            self._progress.update(bar, completed=stage.step, note=stage.headline)
        note = f"served {moment.num_served}"
        if moment.newest_score is not None:
            note += f", score {moment.newest_score:.3f}"
        total = moment.num_versions or None
        self._progress.update(self._versions, completed=moment.num_evaluated, total=total, note=note)
        if not self._console.is_terminal:
            self._print_line(moment)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _print_line(self, moment: RunProgress) -> None:
        stages = [f"{s.kind} {s.step}/{s.max_steps} {s.headline}".strip() for s in moment.stages if s.step]
        versions = f"{moment.num_versions} versions, {moment.num_evaluated} evaluated, {moment.num_served} served"
        line = "; ".join([*stages, versions])
        if line != self._last_line and time.monotonic() >= self._next_line_at:
            self._console.print(line, highlight=False, markup=False)
            self._last_line, self._next_line_at = line, time.monotonic() + _LINE_SECONDS
