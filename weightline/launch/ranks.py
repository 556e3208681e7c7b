"""Starting ranks and staying with them: their lines, their end, and that none of them outlives the flow run.

Free of Prefect, except for the task at the end.
"""

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
    """The launch command, with every line labelled by its rank and kept in a file a rank."""
    start = argv.index("accelerate.commands.launch") + 1
    return [*argv[:start], "--tee", "3", "--log_dir", str(log_dir), *argv[start:]]


def run_ranks(argv: Sequence[str], env: Mapping[str, str], log_path: Path, show: Show, tick: Tick) -> None:
    """Run the launcher to its end. Lines go to `log_path`, and, at a bearable rate, to `show`. `tick` is called often.

    LaunchError carries the last lines of the rank that failed first. However this ends, by an exception or a signal in
    the middle too, no process of the launcher's tree is left; if this process is killed, the kernel tells the launcher.
    """
    marked, mark = marked_environment(env)
    process = start_process(argv, env=marked, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    tree = ProcessTree(process.pid, mark)
    reader = LineReader(cast(IO[bytes], process.stdout), log_path)
    gate = LineGate()
    ended_at = math.inf
    try:
        # Ranks hold the output open. If they outlive their launcher, they are ended with the rest of the tree.
        while not reader.is_done and time.monotonic() < ended_at + _LINGER_SECONDS:
            for line in reader.take(_TURN_SECONDS):
                if gate.passes(line, time.monotonic()):
                    show(line.labelled)
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
            f"{failure}\nEverything that the ranks said is in {log_path}",
            argv=list(argv), returncode=returncode, tail=list(failure.tail),
        )  # fmt: skip


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Of a launcher that has closed its output. One that does not go then is as good as killed."""
    try:
        return process.wait(_LINGER_SECONDS)
    except subprocess.TimeoutExpired:
        return -signal.SIGKILL


class LineReader:
    """Reads a process's output in a thread, so that the process never waits for whoever looks at its lines."""

    def __init__(self, stream: IO[bytes], log_path: Path) -> None:
        self.newest: deque[RankLine] = deque(maxlen=_KEPT_LINES)
        self._stream = stream
        self._log_path = log_path
        self._queue: queue.Queue[RankLine] = queue.Queue(maxsize=_MAX_QUEUED_LINES)
        self._thread = threading.Thread(target=self._run, name="weightline-rank-output", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether the output has ended and every line was taken."""
        return not self._thread.is_alive() and self._queue.empty()

    def take(self, wait_seconds: float) -> list[RankLine]:
        """The lines that have come, after waiting for the first for at most so long."""
        taken: list[RankLine] = []
        try:
            taken.append(self._queue.get(timeout=wait_seconds))
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return taken

    def close(self) -> None:
        """Wait for the rest of the output; the processes have ended."""
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
