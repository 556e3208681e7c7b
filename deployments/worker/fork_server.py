"""Imports the modules that flow runs need, and forks a child process for each flow run.

python -m weightline.deployments.worker.fork_server [MODULE...]

Importing Prefect, torch and the evaluation harness takes 5 to 15 s of CPU, a fork takes milliseconds. Every flow run
has a process, environment, working directory and log of its own, and its memory is freed when it ends.

Requests arrive on stdin and replies go to stdout, one JSON object per line: see `ForkServer` in run_processes.py. A
fork copies only the thread that calls it. So this process only imports modules, and calls no library that starts
threads.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from weightline.launch.processes import die_with_parent

logger = logging.getLogger(__name__)


def main(modules: list[str]) -> None:
    """Imports the modules and serves requests until stdin ends. In a child, executes the flow run of its request."""
    die_with_parent()
    replies = _take_stdout()
    for module in modules:
        _import(module)
    gc.freeze()  # A collection in a child would write to, and so copy, every page that it shares with this process.
    server_pid = os.getpid()
    request = _serve(replies)
    if request is not None:
        os.close(replies)
        settings = _prefect_variables()
        _enter(request, server_pid)
        _run_engine(has_other_settings=_prefect_variables() != settings)


def _take_stdout() -> int:
    """Returns a descriptor for replies. From now on, the output of libraries goes to stderr."""
    replies = os.dup(1)
    os.dup2(2, 1)
    return replies


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        logger.warning("%s is not imported in advance: %s", module, error)


def _serve(replies: int) -> dict[str, Any] | None:
    """Forks a child for each request. Returns the request in the child, and None when stdin has ended."""
    signal.signal(signal.SIGCHLD, lambda *_: _report_ended_children(replies))
    while line := sys.stdin.buffer.readline():
        if _fork(replies) == 0:
            return dict(json.loads(line))
    return None


def _fork(replies: int) -> int | None:
    """Returns the child's pid, 0 in the child, and None when the machine refuses another process."""
    # A child must be reported as started before it is reported as ended.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        pid = os.fork()
    except OSError as error:
        _reply(replies, {"refused": str(error)})
        pid = None
    if pid:
        _reply(replies, {"started": pid})
    elif pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    return pid


def _report_ended_children(replies: int) -> None:
    try:
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _reply(replies, {"ended": ended[0], "returncode": os.waitstatus_to_exitcode(ended[1])})
    except ChildProcessError:
        return


def _reply(replies: int, reply: dict[str, Any]) -> None:
    os.write(replies, f"{json.dumps(reply)}\n".encode())


def _enter(request: dict[str, Any], server_pid: int) -> None:
    """Gives this child the session, environment, working directory and log of the request."""
    os.setsid()
    die_with_parent()
    if os.getppid() != server_pid:
        sys.exit("the fork server ended before its child could follow it")
    _redirect(request["log"])
    os.environ.clear()
    os.environ.update(request["env"])
    if sys.path[0] == str(Path.cwd()):
        sys.path[0] = request["working_dir"]
    os.chdir(request["working_dir"])
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # otherwise every child would continue the same sequence


def _redirect(log: str | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)


def _prefect_variables() -> dict[str, str]:
    """Returns the variables from which Prefect reads its settings. Names with two underscores are not settings."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PREFECT_") and not name.startswith("PREFECT__")
    }


def _run_engine(*, has_other_settings: bool) -> None:
    """Executes the flow run of PREFECT__FLOW_RUN_ID, as `python -m prefect.engine` does."""
    if has_other_settings:  # costs 0.1 s
        from weightline.deployments.prefect_private import reload_settings

        reload_settings()
    sys.argv = ["prefect.engine"]
    sys.modules.pop("prefect.engine", None)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
