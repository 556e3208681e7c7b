"""The parent's side of a warm process: start it, give it a flow run, notice that the run or the process has ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from weightline.deployments.worker.work_queues import Lane
from weightline.launch.processes import ProcessTree, start_process

#: A process that dies this soon after its start would die again at once.
_MIN_LIFE_SECONDS = 5.0
_RESTART_DELAY_SECONDS = 10.0
#: How long a process that is no longer needed may take to send its last logs.
_RETIRE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Ending:
    """A flow run left its process: by returning, or because the process died."""

    flow_run_id: str
    how: Literal["returned", "died"]
    returncode: int | None = None


class WarmProcess:
    """A started `weightline.deployments.worker.process_main` and everything that descends from it."""

    def __init__(self, lane: Lane, log_path: Path | None) -> None:
        log = log_path.open("ab") if log_path else None
        argv = [sys.executable, "-m", "weightline.deployments.worker.process_main", *lane.preload]
        self._popen = start_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        if log is not None:
            log.close()
        self._requests = cast(IO[bytes], self._popen.stdin)
        self._replies = cast(IO[bytes], self._popen.stdout)
        os.set_blocking(self._replies.fileno(), False)
        self._tree = ProcessTree(self._popen.pid)
        self._started_at = time.monotonic()
        self._retired_at: float | None = None

    @property
    def reply_fd(self) -> int:
        """Readable when a run or the process has ended."""
        return self._replies.fileno()

    @property
    def returncode(self) -> int | None:
        """None while it lives."""
        return self._popen.poll()

    @property
    def life_seconds(self) -> float:
        return time.monotonic() - self._started_at

    def request(self, flow_run_id: str) -> None:
        """Hand over a flow run. That the process has died shows in `returncode`."""
        try:
            self._requests.write(f"{flow_run_id}\n".encode())
            self._requests.flush()
        except BrokenPipeError:
            return

    def has_replied(self) -> bool:
        """Whether a run has returned since the last call."""
        return bool(self._replies.read())

    def observe(self) -> None:
        """Take note of descendants."""
        self._tree.observe()

    def retire(self) -> None:
        """Let it end by itself, in its own time: it may still be sending logs."""
        self._requests.close()
        self._retired_at = time.monotonic()

    def is_gone(self) -> bool:
        """Of a retired process: whether it has ended. It is ended by force when it takes too long."""
        if self._retired_at is not None and time.monotonic() - self._retired_at > _RETIRE_SECONDS:
            self.end()
        return self.returncode is not None

    def end(self) -> None:
        """End it and all that descends from it. Safe to repeat."""
        self._tree.end()
        self._popen.wait()
        self._replies.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()


class WarmWorker:
    """One lane: at most one flow run at a time. Its process is replaced when it dies, and after each run if fresh."""

    def __init__(self, lane: Lane, log_path: Path | None = None) -> None:
        self.lane = lane
        self.flow_run_id: str | None = None
        self._log_path = log_path
        self._process: WarmProcess | None = WarmProcess(lane, log_path)
        self._retired: list[WarmProcess] = []
        self._may_start_at = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether it can take a run now."""
        return self.flow_run_id is None and self._process is not None

    @property
    def reply_fd(self) -> int | None:
        """Readable when the run or the process has ended."""
        return None if self._process is None else self._process.reply_fd

    def give(self, flow_run_id: str) -> None:
        """Run this flow run, which is claimed already."""
        assert self._process is not None
        self.flow_run_id = flow_run_id
        self._process.request(flow_run_id)

    def poll(self) -> Ending | None:
        """What ended since the last call, if anything. Also restarts what has to be restarted."""
        self._retired = [process for process in self._retired if not process.is_gone()]
        if self._process is None:
            self._start_when_due()
            return None
        if self.flow_run_id is not None and self._process.has_replied():
            return self._ended("returned", None)
        returncode = self._process.returncode
        return None if returncode is None else self._ended("died", returncode)

    def end_run(self) -> None:
        """End the run by ending its process and all that descends from it; a new one is made ready."""
        self.flow_run_id = None
        self._replace()

    def observe(self) -> None:
        """Take note of the run's processes, so that none is forgotten when it is ended."""
        if self._process is not None:
            self._process.observe()

    def close(self) -> None:
        """End all processes. Safe to repeat."""
        for process in (*self._retired, *([self._process] if self._process else [])):
            process.end()
        self._process, self._retired = None, []

    def _ended(self, how: Literal["returned", "died"], returncode: int | None) -> Ending | None:
        flow_run_id, self.flow_run_id = self.flow_run_id, None
        if how == "died":
            self._replace()
        elif self.lane.is_fresh and self._process is not None:
            self._process.retire()
            self._retired.append(self._process)
            self._process = WarmProcess(self.lane, self._log_path)
        return Ending(flow_run_id, how, returncode) if flow_run_id is not None else None

    def _replace(self) -> None:
        if self._process is None:
            return
        is_ailing = self._process.returncode is not None and self._process.life_seconds < _MIN_LIFE_SECONDS
        self._process.end()
        self._process = None
        self._may_start_at = time.monotonic() + (_RESTART_DELAY_SECONDS if is_ailing else 0.0)
        self._start_when_due()

    def _start_when_due(self) -> None:
        if time.monotonic() >= self._may_start_at:
            self._process = WarmProcess(self.lane, self._log_path)
