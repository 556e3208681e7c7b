"""Starting processes so that none outlives its purpose, and ending whole trees of them. Free of Prefect.

Ranks are started by torchrun in sessions of their own, so ending a process group is not enough: a tree is followed
while it lives, and everything that was ever seen in it is ended, also after the process between has gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import psutil

MARK_VARIABLE = "WEIGHTLINE_LAUNCH"
_PR_SET_PDEATHSIG = 1


def with_parent(argv: Sequence[str]) -> list[str]:
    """The command, wrapped so that the kernel sends SIGTERM when the thread that starts it has gone, even by kill -9.

    Linux with util-linux; elsewhere the command itself.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *argv] if setpriv else list(argv)


def die_with_parent() -> None:
    """Ask the kernel to send this process SIGTERM when the thread that started it has gone. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def start_process(
    argv: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: int | None = subprocess.DEVNULL,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    dies_with_parent: bool = True,
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: a Ctrl-C in the terminal is ours to handle, not its.

    `dies_with_parent=False` is for what shall stay when we go.
    """
    return subprocess.Popen(
        with_parent(argv) if dies_with_parent else list(argv),
        env=None if env is None else dict(env),
        cwd=cwd,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def marked_environment(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The environment with a mark that no other process has, and the mark. Children inherit it."""
    mark = uuid.uuid4().hex
    return {**env, MARK_VARIABLE: mark}, mark


class ProcessTree:
    """A process and all that descends from it. Call `observe` now and then while it lives.

    With a `mark` of its environment (`marked_environment`), descendants are found also when nobody saw them before
    whoever started them was gone.
    """

    def __init__(self, pid: int, mark: str | None = None) -> None:
        self._mark = mark
        self._members: dict[tuple[int, float], psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            self._add([psutil.Process(pid)])
        self.observe()

    def observe(self) -> None:
        """Take note of descendants that are new. Those whose parent has gone in between stay known."""
        for member in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._add(member.children(recursive=True))

    def alive(self) -> list[psutil.Process]:
        """Members that still run. A pid that was given to another process since is not a member."""
        return [member for member in self._members.values() if _is_alive(member)]

    def end(self, grace_seconds: float = 5.0) -> None:
        """SIGTERM to all members, SIGKILL to those that still run after the grace. Safe to repeat."""
        self.observe()
        self._add(_marked_processes(self._mark))
        end_processes(self.alive(), grace_seconds)
        self._add(_marked_processes(self._mark))
        end_processes(self.alive(), 0.0)

    def _add(self, found: Iterable[psutil.Process]) -> None:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._members.setdefault((process.pid, process.create_time()), process)


def _marked_processes(mark: str | None) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter() if mark else ():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK_VARIABLE) == mark:
                found.append(process)
    return found


def end_processes(processes: Iterable[psutil.Process], grace_seconds: float) -> list[psutil.Process]:
    """SIGTERM, wait, SIGKILL. Returns those that even so could not be ended in two seconds."""
    members = [process for process in processes if _is_alive(process)]
    if grace_seconds > 0:
        for process in members:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        _, members = psutil.wait_procs(members, timeout=grace_seconds)
    for process in members:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, members = psutil.wait_procs(members, timeout=2.0)
    return [process for process in members if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
