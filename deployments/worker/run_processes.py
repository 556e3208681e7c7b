"""Starts processes of flow runs for the worker: forked from a fork server, or with a command of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightline.errors import LaunchError
from weightline.launch.processes import with_parent

logger = logging.getLogger(__name__)

#: A fork server that ended within this time would probably end at once again. It is restarted only when a run needs it.
_SHORT_LIFE_SECONDS = 5.0
#: A fork server must not start threads or initialize CUDA, since neither survives a fork. These variables keep OpenMP
#: and pyarrow's allocator from starting threads at import, and make torch ask NVML whether there is a GPU.
_FORK_SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


@dataclass(frozen=True, slots=True)
class RunRequest:
    """The environment, working directory and log of a flow run's process."""

    env: Mapping[str, str]
    working_dir: Path
    log_path: Path | None = None
    """The file for stdout and stderr. None: those of the worker."""


@dataclass(frozen=True, slots=True)
class RunProcess:
    """A started process of a flow run."""

    pid: int
    returncode: asyncio.Future[int] = field(repr=False)
    """Set when the process has ended. A negative value is the signal that ended it."""


async def start_command(command: str, request: RunRequest) -> RunProcess:
    """Starts a flow run's process with a command line of its own. The process repeats all imports."""
    with contextlib.ExitStack() as stack:
        log = None if request.log_path is None else stack.enter_context(request.log_path.open("ab"))
        process = await asyncio.create_subprocess_exec(
            *with_parent(shlex.split(command)), env=dict(request.env), cwd=request.working_dir,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT if log else None, start_new_session=True,
        )  # fmt: skip
    return RunProcess(process.pid, asyncio.ensure_future(process.wait()))


class ForkServer:
    """Runs a fork server (fork_server.py), and restarts it when it ends. All calls come from one event loop."""

    def __init__(self, modules: Sequence[str], settings: Mapping[str, str]) -> None:
        """`settings` are Prefect's settings as variables. Runs with the same settings need not read them again."""
        self._modules = tuple(modules)
        self._settings = dict(settings)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._start_lock = asyncio.Lock()
        self._starting: asyncio.Future[RunProcess] | None = None
        self._running: dict[int, asyncio.Future[int]] = {}
        self._is_closing = False

    @property
    def pid(self) -> int | None:
        """The pid of the running server, or None."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Starts the server, which then imports its modules in the background. Does nothing while one runs."""
        if self._process is not None:
            return
        argv = [sys.executable, "-m", "weightline.deployments.worker.fork_server", *self._modules]
        self._process = await asyncio.create_subprocess_exec(
            *with_parent(argv), env={**os.environ, **self._settings, **_FORK_SERVER_ENVIRONMENT},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._reader = asyncio.create_task(self._read_replies(self._process))

    async def start_run(self, request: RunRequest) -> RunProcess:
        """Forks a process that executes the flow run of the request. LaunchError if the server cannot fork it."""
        fields = {
            "env": dict(request.env),
            "working_dir": str(request.working_dir),
            "log": str(request.log_path) if request.log_path else None,
        }
        async with self._start_lock:  # a reply does not say which request it answers
            await self.start()
            assert self._process is not None
            assert self._process.stdin is not None
            self._starting = asyncio.get_running_loop().create_future()
            self._process.stdin.write(f"{json.dumps(fields)}\n".encode())
            return await self._starting

    async def close(self) -> None:
        """Ends the server and every run that it has forked. Safe to repeat."""
        self._is_closing = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        if self._reader is not None:
            await self._reader

    async def _read_replies(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        started_at = time.monotonic()
        while line := await process.stdout.readline():
            self._take(json.loads(line))
        returncode = await process.wait()
        self._process = None
        self._refuse(f"the fork server ended with exit code {returncode}")
        for ended in self._running.values():
            ended.set_result(returncode)
        self._running.clear()
        if not self._is_closing:
            logger.error("the fork server ended with exit code %d", returncode)
            if time.monotonic() - started_at > _SHORT_LIFE_SECONDS:
                await self.start()

    def _take(self, reply: dict[str, Any]) -> None:
        if "ended" in reply:
            self._running.pop(reply["ended"]).set_result(reply["returncode"])
        elif "refused" in reply:
            self._refuse(reply["refused"])
        else:
            ended = asyncio.get_running_loop().create_future()
            self._running[reply["started"]] = ended
            if self._starting is not None and not self._starting.done():
                self._starting.set_result(RunProcess(reply["started"], ended))

    def _refuse(self, reason: str) -> None:
        if self._starting is not None and not self._starting.done():
            self._starting.set_exception(LaunchError(f"no process could be forked for the run: {reason}"))
