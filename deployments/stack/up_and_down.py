"""Starts, supervises and ends a local stack, and deploys to it or to another server.

Imports Prefect only after the stack's environment has been entered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
from rich.console import Console

from weightline.deployments.stack import DEFAULT_PORT, Engine
from weightline.deployments.stack.folder import SUPERVISOR, StackFolder, StackRecord, ask_to_end, running_stack
from weightline.deployments.stack.stack import Stack, free_port
from weightline.errors import InputError, LaunchError
from weightline.launch.processes import ProcessId, start_process
from weightline.launch.replica import find_vllm_python, require_vllm_python
from weightline.runs.folder import runs_dir_of

_LOOK_SECONDS = 1.0
_UP_SECONDS = 300.0


def bring_up(runs_dir: Path, console: Console, port: int = DEFAULT_PORT, engine: Engine | None = None) -> str:
    """Starts a stack that outlives this process, unless one is up, and returns its UI's URL. Safe to repeat.

    The replica is served by `engine`; None takes that of the stack that is up, else the embedded server. InputError
    where there is no vLLM for it, or the stack that is up has another engine.
    """
    folder = StackFolder.under(runs_dir_of(runs_dir))
    found = running_stack(folder)
    vllm_python = require_vllm_python() if engine is Engine.VLLM else find_vllm_python()
    if found is None:
        bring_down(runs_dir)
        with console.status("starting the Prefect server and deploying the flows"):
            found = _start_supervisor(folder, port, engine or Engine.EMBEDDED)
    elif engine not in (None, found.engine):
        raise InputError(
            f"engine: the stack that is up serves with {found.engine}: end it first (weightline down)", field="engine"
        )
    console.print(f"Dashboard: {found.dashboard_url}", highlight=False)
    if found.vllm_python is not None:
        console.print(f"Inference server: vLLM of {found.vllm_python}", highlight=False, soft_wrap=True)
    elif vllm_python is not None:
        console.print(
            f"vLLM can serve instead of the embedded server ({vllm_python}): weightline down, then weightline up "
            "--engine vllm",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return found.ui_url


def stay_up(runs_dir: Path, console: Console, port: int, engine: Engine = Engine.EMBEDDED) -> None:
    """Runs the supervisor: starts a stack, restarts processes that die, and ends the stack at SIGTERM.

    LaunchError if processes die too often. If the supervisor is killed with kill -9, the stack ends with it.
    """
    vllm_python = require_vllm_python() if engine is Engine.VLLM else None
    stack = Stack(StackFolder.under(runs_dir_of(runs_dir)), port, is_supervised=True, vllm_python=vllm_python)
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
    """Ends the stack of this folder, even if parts of it died. Returns False if there was none. Safe to repeat."""
    folder = StackFolder.under(runs_dir_of(runs_dir))
    was_there = folder.record_path.exists()
    Stack(folder, DEFAULT_PORT).end()
    return was_there


def deploy_everything(runs_dir: Path) -> str:
    """Deploys to the server of PREFECT_API_URL, or to the stack that is up. Returns the server's URL. Safe to repeat.

    InputError if there is neither, or no server answers; LaunchError with Prefect's message if it refuses.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        _require_answer(url)
    else:
        folder = StackFolder.under(runs_dir_of(runs_dir))
        found = running_stack(folder)
        if found is None:
            raise InputError("no Prefect server is known: set PREFECT_API_URL, or start a stack (weightline up)")
        Stack(folder, found.port).enter()
    from weightline.deployments.server.deploy import deploy_all

    deploy_all()
    return os.environ["PREFECT_API_URL"]


@contextmanager
def stack_of(runs_dir: Path, console: Console, port: int) -> Iterator[Stack]:
    """Yields the stack that is up, which stays up, or starts one for the block and ends it."""
    folder = StackFolder.under(runs_dir)
    found = running_stack(folder)
    if found is not None:
        console.print(f"using the stack that is up at {found.ui_url}", highlight=False)
        stack = Stack(folder, found.port)
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
    if stack.sqlite_reason is not None:
        console.print(f"Prefect's database is SQLite: {stack.sqlite_reason}", highlight=False, soft_wrap=True)
    from prefect.client.orchestration import get_client

    from weightline.deployments.server.deploy import deploy_all, end_stale_runs

    with console.status("deploying the flows"):
        with get_client(sync_client=True) as client:
            end_stale_runs(client)
        stack.start_worker()  # imports its modules while the flows are deployed
        deploy_all(keeps_toggles=True)
    console.print(f"Prefect UI: {stack.ui_url}", highlight=False)


def _start_supervisor(folder: StackFolder, port: int, engine: Engine) -> StackRecord:
    """Starts the supervisor, and returns when the whole stack is up and deployed.

    LaunchError with the supervisor's last lines if it ends before that. After an error or an interrupt, no process is
    left.
    """
    folder.make()
    runs_dir = str(folder.root.parent)
    argv = [sys.executable, "-m", "weightline", "stay", "--runs-dir", runs_dir, "--port", str(free_port(port))]
    argv += ["--engine", engine]
    with folder.log_path(SUPERVISOR).open("ab") as log:
        process = start_process(argv, stdout=log, stderr=subprocess.STDOUT, dies_with_parent=False)
    process_id = ProcessId.of(process.pid)
    try:
        return _wait_until_up(folder, process)
    except BaseException:
        ask_to_end(process_id, signal.SIGTERM, _UP_SECONDS)
        raise


def _wait_until_up(folder: StackFolder, process: subprocess.Popen[bytes]) -> StackRecord:
    deadline = time.monotonic() + _UP_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = folder.last_lines(SUPERVISOR)
            message = "the stack did not come up. The supervisor's last lines:"
            raise LaunchError("\n    ".join([message, *tail]), returncode=process.returncode, tail=tail)
        found = running_stack(folder)
        if found is not None and found.dashboard_url is not None:  # the dashboard is started last
            return found
        time.sleep(0.2)
    raise LaunchError(
        f"the stack did not come up in {_UP_SECONDS:.0f} s: see {folder.log_path(SUPERVISOR)}", name=SUPERVISOR
    )


def _require_answer(api_url: str) -> None:
    """Raises InputError at once if no server answers at the URL; Prefect's client would retry for minutes."""
    try:
        httpx.get(f"{api_url}/health", timeout=10.0)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise InputError(
            f"PREFECT_API_URL: no Prefect server answers at {api_url} ({error}): start one, or unset the variable to "
            "use the stack that is up (weightline up)",
            field="PREFECT_API_URL",
        ) from error
