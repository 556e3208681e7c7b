"""A whole pipeline on one machine, from nothing to a summary, and the end of everything that was started for it.

Imports no Prefect before the stack's environment is entered.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from rich.console import Console

from weightline.deployments.stack import DEFAULT_PORT
from weightline.deployments.stack.screen import RunScreen
from weightline.deployments.stack.stack import (
    Stack,
    StackFolder,
    free_port,
    port_of,
    require_answer,
    running_stack,
)
from weightline.deployments.stack.supervisor import start_supervisor
from weightline.errors import InputError, LaunchError
from weightline.runs.folder import Run, runs_dir_of
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import RunProgress, RunWatch
from weightline.runs.summary import stage_lines, versions_table, write_summary

if TYPE_CHECKING:
    from weightline.deployments.server.flow_runs import RunState

_LOOK_SECONDS = 1.0
_STATE_SECONDS = 2.0
#: After training: when nothing has moved for so long, the events are taken for lost; and when it is given up.
_CATCH_UP_SECONDS = 12.0
_MAX_CATCH_UPS = 3
_GIVE_UP_SECONDS = 240.0


def run_pipeline(
    recipe: str | Path | None, runs_dir: Path, run_id: str | None, console: Console, port: int = DEFAULT_PORT
) -> Run:
    """Train, evaluate and serve a recipe's versions under a local stack, then print and write what came of it.

    Uses a stack that is up in `runs_dir`; else starts one and ends it. RecipeError or InputError before anything is
    started; LaunchError with the failing rank's last lines when the run fails, or when versions stay without a word on
    their evaluation or serving. Whatever happens, no process of ours is left.
    """
    started = time.monotonic()
    run = prepare_run(recipe, runs_dir, run_id)
    console.print(f"run {run.run_id}: {run.placement.num_processes} ranks on {run.placement.device}", highlight=False)
    console.print(f"chain {run.chain_url}", highlight=False, soft_wrap=True)
    with stack_of(runs_dir_of(runs_dir), console, port) as stack:
        _train(run, stack, console)
        rows = RunWatch(run).look().rows
        summary = write_summary(run, rows, stack.ui_url, time.monotonic() - started)
        console.print(versions_table(rows, f"{run.run_id} in {summary.seconds:.0f} s"))
        for line in stage_lines(summary):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(f"Prefect UI: {stack.ui_url} (weightline up shows it again)", highlight=False)
        console.print(f"summary: {run.summary_path}", highlight=False, soft_wrap=True)
    return run


def bring_up(runs_dir: Path, console: Console, port: int = DEFAULT_PORT) -> str:
    """Start a stack that stays, and return its UI's URL; the one that is up already if there is one. Safe to repeat."""
    folder = StackFolder.under(runs_dir_of(runs_dir))
    found = running_stack(folder)
    if found is not None:
        console.print(f"Dashboard: {found.dashboard_url}", highlight=False)
        return found.ui_url
    bring_down(runs_dir)
    with console.status("starting the Prefect server and deploying the flows"):
        facts = start_supervisor(folder, port)
    console.print(f"Dashboard: {facts.dashboard_url}", highlight=False)
    return facts.ui_url


def stay_up(runs_dir: Path, console: Console, port: int) -> None:
    """Be the supervisor: start a stack, and start again what dies, until SIGTERM; then end everything.

    LaunchError when something dies again and again. Killed with kill -9, it takes the stack along.
    """
    stack = Stack(StackFolder.under(runs_dir_of(runs_dir)), port, is_supervised=True)
    try:
        _start(stack, console)
        stack.start_dashboard()
        while True:
            for name in stack.keep_up():
                console.print(f"{datetime.now():%F %T} the {name} had died and was started again", highlight=False)
            time.sleep(_LOOK_SECONDS)
    finally:
        stack.end()


def bring_down(runs_dir: Path) -> bool:
    """End the stack of this folder, whole or not. False when there was none. Safe to repeat."""
    folder = StackFolder.under(runs_dir_of(runs_dir))
    was_there = folder.facts_path.exists()
    Stack(folder, DEFAULT_PORT).end()
    return was_there


def deploy_everything(runs_dir: Path) -> str:
    """Deploy to the server of PREFECT_API_URL, or to the stack that is up. Returns the server's URL. Safe to repeat.

    InputError when there is neither, or nothing answers there; LaunchError with Prefect's own words when it refuses.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        require_answer(url)
    else:
        folder = StackFolder.under(runs_dir_of(runs_dir))
        found = running_stack(folder)
        if found is None:
            raise InputError("no Prefect server is known: set PREFECT_API_URL, or start a stack (weightline up)")
        Stack(folder, port_of(found)).enter()
    from weightline.deployments.server.deploy import deploy_all

    deploy_all()
    return os.environ["PREFECT_API_URL"]


@contextmanager
def stack_of(runs_dir: Path, console: Console, port: int) -> Iterator[Stack]:
    """The stack that is up, left as it is; or one of our own, ended at the end."""
    folder = StackFolder.under(runs_dir)
    found = running_stack(folder)
    if found is not None:
        console.print(f"using the stack that is up at {found.ui_url}", highlight=False)
        stack = Stack(folder, port_of(found))
        stack.enter()
        yield stack
        return
    bring_down(runs_dir)
    stack = Stack(folder, free_port(port))
    try:
        _start(stack, console)
        yield stack
    finally:
        stack.end()


def _start(stack: Stack, console: Console) -> None:
    with console.status("starting the Prefect server"):
        stack.enter()
        stack.start_server()
    from prefect.client.orchestration import get_client

    from weightline.deployments.server.deploy import deploy_all, end_stale_runs

    with console.status("deploying the flows"):
        with get_client(sync_client=True) as client:
            end_stale_runs(client)
        stack.start_runner()  # its processes import what they need while the flows are deployed
        deploy_all(keeps_toggles=True)
    console.print(f"Prefect UI: {stack.ui_url}", highlight=False)


def _train(run: Run, stack: Stack, console: Console) -> None:
    """Start the flow run, show it while it goes, and see every version evaluated and offered to serving."""
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
        told = state.message.removeprefix("Flow run encountered an exception: ")
        raise LaunchError(f"the run ended {state.kind.lower()}: {told}", state=state.kind)


def _watch_settling(run: Run, stack: Stack, watch: RunWatch, screen: RunScreen) -> None:
    """Wait for evaluation and serving. Events can be lost: what does not move is started from the bucket."""
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
