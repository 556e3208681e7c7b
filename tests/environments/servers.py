"""The built-in environment as a process of its own, which tests kill and start again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from tests import ROOT


class RunningEnvironment:
    """`weightline serve environment word-game`, at one address over all its restarts."""

    def __init__(self, log_path: Path, *options: str) -> None:
        self._log_path, self._options = log_path, options
        self.url = ""
        self.process = self._start("0")

    def kill(self) -> None:
        """Ends the server as kill -9 does."""
        self.process.kill()
        self.process.communicate()

    def restart(self) -> None:
        """Starts the server again at its address."""
        self.process = self._start(str(urlsplit(self.url).port))

    def _start(self, port: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "weightline", "serve", "environment", "word-game", "--port", port, *self._options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DO_NOT_TRACK": "1"}
        with self._log_path.open("a") as log:
            process = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        # The line is written when the port is taken. Connections wait until the server has imported OpenEnv.
        self.url = process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), self._log_path.read_text()
        return process


@contextmanager
def running_environment(log_path: Path, *options: str) -> Iterator[RunningEnvironment]:
    """An environment for the length of a block."""
    running = RunningEnvironment(log_path, *options)
    try:
        yield running
    finally:
        running.kill()
