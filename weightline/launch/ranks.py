"""Runs a stage's ranks to their end: forwards their output, explains their failure, and leaves no process behind."""

from __future__ import annotations

import math
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

from weightline.errors import LaunchError
from weightline.launch.processes import ProcessTree, marked_environment, start_process
from weightline.launch.rank_output import LineGate, RankLine, explain_failure, parse_line

_KEPT_LINES = 400
_MAX_QUEUED_LINES = 2_000
_TURN_SECONDS = 0.5
_LINGER_SECONDS = 3.0

Show = Callable[[str], None]
Tick = Callable[[], None]


def with_rank_logs(argv: Sequence[str], log_dir: Path) -> list[str]:
    """Returns the launch command with options that label every line by its rank and keep one file for each rank."""
    start = argv.index("accelerate.commands.launch") + 1
    return [*argv[:start], "--tee", "3", "--log_dir", str(log_dir), *argv[start:]]


def run_ranks(argv: Sequence[str], env: Mapping[str, str], log_path: Path, show: Show, tick: Tick) -> None:
    """Runs the launcher to its end. Lines go to `log_path` and, at a limited rate, to `show`; `tick` is called often.

    Raises LaunchError with the last lines of the rank that failed first. No process of the launcher's tree is left,
    also after an exception or a signal. If this process is killed, the kernel sends the launcher SIGTERM.
    """
    marked, mark = marked_environment(env)
    process = start_process(argv, env=marked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tree = ProcessTree(process.pid, mark)
    reader = LineReader(cast(IO[bytes], process.stdout), log_path)
    gate = LineGate()
    ended_at = math.inf
    try:
        # Ranks keep the output open. If they outlive their launcher, they are ended with the rest of the tree.
        while not reader.is_done and time.monotonic() < ended_at + _LINGER_SECONDS:
            for line in reader.take(_TURN_SECONDS):
                if gate.passes(line, time.monotonic()):
                    show(line.labeled)
            tree.observe()
            tick()
            if process.poll() is not None:
                ended_at = min(ended_at, time.monotonic())
        returncode = _exit_code(process)
    finally:
        tree.end()
        process.wait()
        reader.close()
    if gate.num_held_back:
        show(f"{gate.num_held_back} further lines are in {log_path}")
    if returncode != 0:
        failure = explain_failure(reader.newest, returncode)
        raise LaunchError(
            f"{failure}\nThe whole output of the ranks is in {log_path}",
            argv=list(argv), returncode=returncode, tail=list(failure.tail),
        )  # fmt: skip


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Returns the exit code of a launcher that has closed its output. If it does not end soon, it counts as killed."""
    try:
        return process.wait(_LINGER_SECONDS)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


class LineReader:
    """Reads a process's output in a thread, so that the process never blocks on its output."""

    def __init__(self, stream: IO[bytes], log_path: Path) -> None:
        self.newest: deque[RankLine] = deque(maxlen=_KEPT_LINES)
        self._stream = stream
        self._log_path = log_path
        self._queue: queue.Queue[RankLine] = queue.Queue(maxsize=_MAX_QUEUED_LINES)
        self._thread = threading.Thread(target=self._run, name="weightline-rank-output", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Returns whether the output has ended and every line was taken."""
        return not self._thread.is_alive() and self._queue.empty()

    def take(self, wait_seconds: float) -> list[RankLine]:
        """Returns the lines that have arrived. Waits for the first one for at most `wait_seconds`."""
        taken: list[RankLine] = []
        try:
            taken.append(self._queue.get(timeout=wait_seconds))
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return taken

    def close(self) -> None:
        """Reads the rest of the output. The processes must have ended."""
        self._thread.join(timeout=_LINGER_SECONDS)
        if not self._thread.is_alive():
            self._stream.close()

    def _run(self) -> None:
        with self._log_path.open("ab") as log:
            for raw in self._stream:
                log.write(raw)
                log.flush()
                line = parse_line(raw.decode("utf-8", errors="replace"))
                self.newest.append(line)
                try:
                    self._queue.put_nowait(line)
                except queue.Full:
                    continue
