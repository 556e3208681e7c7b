"""Which processes a local stack consists of, in a file, so that `down` ends exactly those. Free of Prefect.

A pid alone names whoever has it now; with the time of its start it names one process for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from weightline.files import write_atomically
from weightline.launch.processes import ProcessTree

#: The process that starts the others again when they have died.
SUPERVISOR = "supervisor"
_SUPERVISOR_SECONDS = 40.0


@dataclass(frozen=True, slots=True)
class StackProcess:
    """One process that a stack started."""

    name: str
    pid: int
    created_at: float
    """Seconds since the epoch, as the kernel tells it."""

    @classmethod
    def of(cls, name: str, pid: int) -> StackProcess:
        """The running process. psutil.NoSuchProcess when it has ended."""
        return cls(name, pid, psutil.Process(pid).create_time())

    def is_alive(self) -> bool:
        """Whether that very process still runs."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created_at and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def ask_to_end(self, wait_seconds: float) -> None:
        """SIGTERM to that very process alone, and wait for it to go. Safe to repeat."""
        if self.is_alive():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(self.pid)
                process.terminate()
                process.wait(wait_seconds)

    def end(self) -> None:
        """End it and all that descends from it; nothing when the pid is another process's by now. Safe to repeat."""
        if self.is_alive():
            ProcessTree(self.pid).end()


@dataclass(frozen=True, slots=True)
class StackFacts:
    """What is written down about a running stack."""

    api_url: str
    ui_url: str
    processes: tuple[StackProcess, ...]
    dashboard_url: str | None = None

    @property
    def is_up(self) -> bool:
        """Whether all of it runs."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        """End what still runs, but for the caller: the supervisor, which ends the others; then, last started first,
        what is left. Safe to repeat.
        """
        others = [process for process in self.processes if process.pid != os.getpid()]
        for process in others:
            if process.name == SUPERVISOR:
                process.ask_to_end(_SUPERVISOR_SECONDS)
        for process in reversed(others):
            process.end()


def write_facts(path: Path, facts: StackFacts) -> None:
    """Write the file in one rename."""
    write_atomically(path, json.dumps(asdict(facts), indent=1))


def read_facts(path: Path) -> StackFacts | None:
    """What the file says, or None when there is none (or none that can be read)."""
    try:
        told = json.loads(path.read_text())
        processes = tuple(StackProcess(**process) for process in told["processes"])
        return StackFacts(told["api_url"], told["ui_url"], processes, told.get("dashboard_url"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
