"""A process that has imported what flow runs need, and forks a child for each of them.

python -m weightline.deployments.worker.fork_server [MODULE...]

Importing Prefect, torch and the evaluation harness costs 5 to 15 s of CPU; a fork costs milliseconds. Every flow run
gets a process, environment, working directory and log of its own, and its memory goes with it.

Requests come on stdin and replies go to stdout, one JSON object a line: see `ForkServer` in run_processes.py. A fork
copies only the thread that calls it, so nothing but imports may run here: a library that starts threads when it is used
must not be used.
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
    """Returns a descriptor for replies. Whatever libraries print goes to stderr from now on."""
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
    # No child may be reported as ended before it was reported as started.
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
    """Makes this child what a process that was started for the request would be."""
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
        numpy.random.seed()  # else every child would continue the same sequence


def _redirect(log: str | None) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)


def _prefect_variables() -> dict[str, str]:
    """Returns the variables that Prefect's settings are read from. Those with two underscores are no settings."""
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
