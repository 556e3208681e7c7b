"""Runs a whole pipeline on one machine, shows its progress, and prints a summary.

Imports Prefect only after the stack's environment has been entered.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from uuid import UUID

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from weightline.deployments.stack import DEFAULT_PORT
from weightline.deployments.stack.stack import Stack
from weightline.deployments.stack.up_and_down import stack_of
from weightline.errors import LaunchError
from weightline.runs.folder import Run, runs_dir_of
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import RunProgress, RunWatch
from weightline.runs.summary import count_line, milestone_rows, stage_lines, versions_table, write_summary

if TYPE_CHECKING:
    from weightline.deployments.server.flow_runs import RunState

_LOOK_SECONDS = 1.0
_STATE_SECONDS = 2.0
#: After training, events count as lost if nothing was evaluated or served for this time; then `reconcile` is started.
_CATCH_UP_SECONDS = 12.0
_MAX_CATCH_UPS = 3
#: After training, the run fails if evaluation and serving take longer.
_GIVE_UP_SECONDS = 240.0
#: The shortest time between two printed lines if there is no terminal.
_LINE_SECONDS = 15.0


def run_pipeline(
    recipe: str | Path | None, runs_dir: Path, run_id: str | None, console: Console, port: int = DEFAULT_PORT
) -> Run:
    """Trains, evaluates and serves a recipe's versions under a local stack, and prints and writes the results.

    Uses a stack that is up in `runs_dir`; else starts one and ends it. Raises RecipeError or InputError before anything
    is started, and LaunchError when the run fails (with the failing rank's last lines) or when versions stay without
    an evaluation or refresh record. No process that it started is left.
    """
    started = time.monotonic()
    run = prepare_run(recipe, runs_dir, run_id)
    console.print(f"run {run.run_id}: {run.placement.num_processes} ranks on {run.placement.device}", highlight=False)
    console.print(f"chain {run.chain_url}", highlight=False, soft_wrap=True)
    with stack_of(runs_dir_of(runs_dir), console, port) as stack:
        _train(run, stack, console)
        rows = RunWatch(run).look().rows
        summary = write_summary(run, rows, stack.ui_url, time.monotonic() - started)
        shown = milestone_rows(rows)
        console.print(versions_table(shown, f"{run.run_id} in {summary.seconds:.0f} s"))
        console.print(count_line(len(shown), len(rows), run.chain_url), highlight=False, soft_wrap=True)
        for line in stage_lines(summary):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(f"Prefect UI: {stack.ui_url} (weightline up shows it again)", highlight=False)
        console.print(f"summary: {run.summary_path}", highlight=False, soft_wrap=True)
    return run


def _train(run: Run, stack: Stack, console: Console) -> None:
    """Starts the flow run, shows its progress, and waits until every version is evaluated and offered to serving."""
    from weightline.deployments.server.flow_runs import start_training

    flow_run_id = start_training(run)
    console.print(f"flow run: {stack.ui_url}/runs/flow-run/{flow_run_id}", highlight=False, soft_wrap=True)
    with RunScreen(console, run) as screen:
        watch = RunWatch(run)
        _watch_training(flow_run_id, stack, watch, screen)
        _watch_settling(run, stack, watch, screen)


def _watch_training(flow_run_id: UUID, stack: Stack, watch: RunWatch, screen: RunScreen) -> None:
    from weightline.deployments.server.flow_runs import read_run_state

    next_state_at = 0.0
    state: RunState | None = None
    while state is None or not state.is_final:
        screen.show(watch.look())
        for name in stack.keep_up():
            screen.say(f"the {name} had died and was started again")
        if time.monotonic() >= next_state_at:
            state = read_run_state(flow_run_id)
            next_state_at = time.monotonic() + _STATE_SECONDS
        time.sleep(_LOOK_SECONDS)
    if not state.is_completed:
        message = state.message.removeprefix("Flow run encountered an exception: ")
        raise LaunchError(f"the run ended {state.kind.lower()}: {message}", state=state.kind)


def _watch_settling(run: Run, stack: Stack, watch: RunWatch, screen: RunScreen) -> None:
    """Waits for evaluation and serving. If nothing moves, events may be lost, and `reconcile` is started."""
    from weightline.deployments.server.flow_runs import start_reconcile

    deadline = time.monotonic() + _GIVE_UP_SECONDS
    moment = watch.look()
    moved_at, num_catch_ups = time.monotonic(), 0
    while moment.unsettled:
        if time.monotonic() > deadline:
            names = ", ".join(f"v{version}" for version in moment.unsettled)
            raise LaunchError(f"{names} were not evaluated or not offered to serving: see {stack.folder.log_dir}")
        time.sleep(_LOOK_SECONDS)
        stack.keep_up()
        before, moment = moment, watch.look()
        screen.show(moment)
        if _has_moved(before, moment):
            moved_at = time.monotonic()
        elif time.monotonic() - moved_at > _CATCH_UP_SECONDS and num_catch_ups < _MAX_CATCH_UPS:
            start_reconcile(run)
            moved_at, num_catch_ups = time.monotonic(), num_catch_ups + 1
    screen.show(moment)


def _has_moved(before: RunProgress, after: RunProgress) -> bool:
    return (before.num_evaluated, before.num_served) != (after.num_evaluated, after.num_served)


class RunScreen:
    """Shows a run on a terminal: a bar for each stage and one for the versions. Elsewhere it prints a line at times."""

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
        """Draws the bars; without a terminal, prints a line if one is due and differs from the last."""
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
        """Prints a line above the bars."""
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
