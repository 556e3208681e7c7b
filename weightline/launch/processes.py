"""Starts processes so that none outlives its parent, and ends whole trees of them.

torchrun starts ranks in sessions of their own, so ending a process group is not enough. A tree is observed while it
lives, and every process that was ever observed in it is ended, also one whose parent has ended since.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

MARK_VARIABLE = "WEIGHTLINE_LAUNCH"
#: Environment variable that a worker sets for its flow runs: its pid. Processes that outlive a run end with the worker.
WORKER_PID_VARIABLE = "WEIGHTLINE_WORKER_PID"
_PR_SET_PDEATHSIG = 1


def with_parent(argv: Sequence[str]) -> list[str]:
    """Returns the command wrapped so that the kernel sends it SIGTERM when the thread that starts it ends in any way.

    Needs Linux with util-linux; on other systems it returns the command itself.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *argv] if setpriv else list(argv)


def die_with_parent() -> None:
    """Makes the kernel send this process SIGTERM when the thread that started it ends. Has an effect on Linux only."""
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
    """Starts a command in a session of its own, so that a Ctrl-C in the terminal reaches only this process.

    `dies_with_parent=False` is for a process that shall outlive this one.
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


@dataclass(frozen=True, slots=True)
class ProcessId:
    """Identifies one process permanently. A pid alone may be reused by another process later."""

    pid: int
    created_at: float
    """Start of the process in seconds since the epoch, from the kernel."""

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Returns the id of a running process. psutil.NoSuchProcess when there is none."""
        return cls(pid, psutil.Process(pid).create_time())

    def find(self) -> psutil.Process | None:
        """Returns the process, or None when it has ended."""
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.created_at and _is_alive(process) else None
        except psutil.NoSuchProcess:
            return None

    def is_alive(self) -> bool:
        """Returns whether this process still runs."""
        return self.find() is not None

    def end(self) -> None:
        """Ends the process and its descendants. Safe to repeat."""
        if self.is_alive():
            ProcessTree(self.pid).end()


def marked_environment(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """Returns the environment with a unique mark, which children inherit, and the mark."""
    mark = uuid.uuid4().hex
    return {**env, MARK_VARIABLE: mark}, mark


class ProcessTree:
    """A process and its descendants. `observe` must be called regularly while the process lives.

    With a `mark` of its environment (`marked_environment`), `end` also finds descendants that were never observed
    before their parent ended.
    """

    def __init__(self, pid: int, mark: str | None = None) -> None:
        self.pid = pid
        self._mark = mark
        self._members: dict[tuple[int, float], psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            self._add([psutil.Process(pid)])
        self.observe()

    def observe(self) -> None:
        """Adds new descendants. Those whose parent has ended in the meantime stay members."""
        for member in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._add(member.children(recursive=True))

    def alive(self) -> list[psutil.Process]:
        """Returns the members that still run. A process that reuses the pid of an ended member is not a member."""
        return [member for member in self._members.values() if _is_alive(member)]

    def end(self, grace_seconds: float = 5.0) -> None:
        """Sends SIGTERM to all members, and SIGKILL to those that still run after the grace. Safe to repeat."""
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
    """Sends SIGTERM, waits, sends SIGKILL. Returns the processes that still run two seconds later."""
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
