"""Implements the Prefect worker type `weightline`, whose flow runs start with all imports done.

    prefect worker start --pool weightline [--work-queue evaluation ...]

Prefect's own process worker starts an interpreter for each flow run, which takes 5 to 15 s of CPU for importing torch
and the evaluation harness, on the cores that train. This worker keeps one process that has imported them, and forks it
for each run (fork_server.py). Polling, limits, heartbeats and the state of a run whose process died are those of
Prefect's base class. This class adds three things: cancelling a run ends its whole process tree, cancelling a subflow
ends the run that it belongs to, and runs that a killed worker left behind are marked as crashed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import anyio.abc
import httpx
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import InfrastructureNotFound, ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from pydantic import Field, PrivateAttr

from weightline.deployments.worker import WORK_QUEUES, WORKER_TYPE, run_states
from weightline.deployments.worker.run_processes import ForkServer, RunProcess, RunRequest, start_command
from weightline.launch.processes import WORKER_PID_VARIABLE, ProcessTree

#: The modules that execute any flow run. A module that a release of Prefect lacks is skipped, which only costs time.
_ENGINE = ("prefect.engine", "prefect.flow_engine", "prefect.flows", "anyio._backends._asyncio")

logger = logging.getLogger(__name__)

_CANCEL_POLL_SECONDS = 2.0
_AWAY_SECONDS = 2.0
_HELD_SECONDS = 2.0
_OFFER_SECONDS = 5.0
_STOP_SECONDS = 3.0


class WarmJobConfiguration(BaseJobConfiguration):
    """The environment, command and working directory of a flow run's process."""

    working_dir: Path | None = Field(default=None)
    _has_command: bool = PrivateAttr(default=False)

    def prepare_for_flow_run(self, flow_run: FlowRun, *args: Any, **kwargs: Any) -> None:
        """Completes the environment: the worker's own, with what Prefect and the job variables add or remove."""
        removed = [name for name, value in self.env.items() if value is None]
        self._has_command = self.command is not None
        super().prepare_for_flow_run(flow_run, *args, **kwargs)
        self.env = {**os.environ, WORKER_PID_VARIABLE: str(os.getpid()), **self.env}
        for name in removed:
            self.env.pop(name, None)

    @property
    def own_command(self) -> str | None:
        """The command line in the job variables, or None if the run is forked."""
        return self.command if self._has_command else None


class WarmVariables(BaseVariables):
    """The job variables of a pool, a deployment or a run, as the UI shows them."""

    command: str | None = Field(
        default=None,
        description="Command line for flow runs, as in `python -m prefect.engine`. Its process repeats all imports, so "
        "that variables which a library reads at import take effect. Empty: the run is forked from a process with "
        "all imports done.",
    )
    working_dir: Path | None = Field(
        default=None, title="Working Directory", description="Working directory of flow runs. Empty: the worker's."
    )


class WarmWorkerResult(BaseWorkerResult):
    """The result of a flow run's process."""


class WarmWorker(BaseWorker[WarmJobConfiguration, WarmVariables, WarmWorkerResult]):
    """Executes each flow run in a process that is forked from one with all imports done."""

    type = WORKER_TYPE
    job_configuration = WarmJobConfiguration
    job_configuration_variables = WarmVariables
    _description = "Execute flow runs as processes that are forked from one which has imported torch and the flows."
    _display_name = "Weightline"

    def __init__(self, work_pool_name: str, work_queues: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(work_pool_name, work_queues, **kwargs)
        self._queues = list(work_queues or ())
        modules = [module for queue in self._queues or WORK_QUEUES for module in WORK_QUEUES.get(queue, ())]
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        self._fork_server = ForkServer([*_ENGINE, *modules], settings)
        self._pool_name = work_pool_name
        self._offered_at = 0.0
        self._held_back: set[UUID] = set()
        self._has_room = True
        self._limits = run_states.Limits(None, {})
        self._trees: dict[UUID, ProcessTree] = {}
        self._suspects: set[UUID] = set()

    async def setup(self) -> None:
        """Starts the fork server, which begins its imports, and then connects."""
        _end_on_sigterm()
        await self._fork_server.start()
        await super().setup()

    async def teardown(self, *exc_info: Any) -> None:
        """Ends all runs, then disconnects and ends the fork server."""
        await super().teardown(*exc_info)
        await self._fork_server.close()

    async def run(
        self,
        flow_run: FlowRun,
        configuration: WarmJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> WarmWorkerResult:
        """Executes the flow run in a process of its own and returns when it has ended, by itself or by request."""
        if await run_states.is_over_limit(self.client, self._pool_name, self._limits, flow_run):
            self.get_flow_run_logger(flow_run).info("This run waits: another has taken the slot at the same moment")
            await run_states.give_back(self.client, flow_run.id)
            if task_status is not None:
                task_status.started(0)
            return WarmWorkerResult(identifier="", status_code=0)
        process = await self._start_process(flow_run, configuration)
        tree = ProcessTree(process.pid)
        self._trees[flow_run.id] = tree
        if task_status is not None:
            task_status.started(process.pid)
        try:
            await self._follow(flow_run, process, tree)
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True), anyio.move_on_after(_STOP_SECONDS):
                await anyio.to_thread.run_sync(tree.end)
                await run_states.mark_crashed(self.client, flow_run.id, "Its worker was stopped")
            raise
        finally:
            del self._trees[flow_run.id]
            self._has_room = True
        return WarmWorkerResult(identifier=str(process.pid), status_code=process.returncode.result())

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: WarmJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Ends the process of a run that was cancelled before it began. Called by the base class."""
        for tree in self._trees.values():
            if str(tree.pid) == infrastructure_pid:
                return await anyio.to_thread.run_sync(tree.end, float(grace_seconds))
        raise InfrastructureNotFound(f"no run of this worker has the pid {infrastructure_pid}")

    async def sync_with_backend(self) -> None:
        """Sends a heartbeat, reads the limits, and marks runs whose worker is gone as crashed."""
        await super().sync_with_backend()
        with contextlib.suppress(ObjectNotFound):  # there is no pool yet, and this worker may not create it
            self._limits = await run_states.read_limits(self.client, self._pool_name)
            await self._mark_orphans()

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Starts due runs and returns them. The base class calls this at every poll.

        While the server is unavailable, this returns nothing and the worker polls again; the base class would give up
        after a while and end its runs. An offer of runs costs the server 40 ms of CPU and several writes. So the worker
        asks for an offer only when a run is due, and for runs that a limit or a pause held back only when a run has
        ended or some time has passed. It also asks every few seconds without a due run, because these requests show the
        server and the health check that the worker polls.
        """
        try:
            now = time.monotonic()
            due = await run_states.due_runs(self.client, self._pool_name, self._queues)
            is_new = bool(due) and (due != self._held_back or self._has_room or now > self._offered_at + _HELD_SECONDS)
            if not is_new and now < self._offered_at + _OFFER_SECONDS:
                return []
            self._offered_at, self._has_room = now, False
            started = await super().get_and_submit_flow_runs()
            self._held_back = set() if started else due
            return started
        except httpx.TransportError as error:
            logger.warning("the Prefect server does not answer: %r", error)
            await anyio.sleep(_AWAY_SECONDS)
            return []

    async def _start_process(self, flow_run: FlowRun, configuration: WarmJobConfiguration) -> RunProcess:
        request = RunRequest(
            env={name: value for name, value in configuration.env.items() if value is not None},
            working_dir=configuration.working_dir or Path.cwd(),
            log_path=_log_path(flow_run),
        )
        if configuration.own_command is not None:
            return await start_command(configuration.own_command, request)
        return await self._fork_server.start_run(request)

    async def _follow(self, flow_run: FlowRun, process: RunProcess, tree: ProcessTree) -> None:
        """Waits until the run's process has ended, and reports to the server how the run ended."""
        cancelled: list[UUID] = []
        while not process.returncode.done():
            await asyncio.wait([process.returncode], timeout=_CANCEL_POLL_SECONDS)
            tree.observe()
            if not process.returncode.done() and (cancelled := await self._runs_to_cancel(flow_run)):
                self.get_flow_run_logger(flow_run).info("Ending the processes of this run, as requested")
                await anyio.to_thread.run_sync(tree.end)
                await process.returncode
        await self._report_end(flow_run.id, process.returncode.result(), cancelled)

    async def _report_end(self, flow_run_id: UUID, returncode: int, cancelled: list[UUID]) -> None:
        """Reports to the server how the run ended, unless the run has done so. Retries until the server answers."""
        died = f"Its process died with exit code {returncode}"
        while True:
            try:
                if cancelled:
                    return await run_states.mark_cancelled(self.client, cancelled)
                message = died if returncode else "Its process returned without a final state"
                return await run_states.mark_crashed(self.client, flow_run_id, message)
            except httpx.TransportError as error:
                logger.warning("the Prefect server does not answer: %r", error)
                await anyio.sleep(_AWAY_SECONDS)

    async def _runs_to_cancel(self, flow_run: FlowRun) -> list[UUID]:
        try:
            return await run_states.runs_to_cancel(self.client, flow_run.id)
        except (httpx.HTTPError, ObjectNotFound) as error:
            logger.debug("the state of flow run %s cannot be read: %r", flow_run.id, error)
            return []

    async def _mark_orphans(self) -> None:
        """Marks orphans of two heartbeats in a row. Right after an outage, the server lists no worker as online."""
        found = await run_states.find_orphans(self.client, self._pool_name, self._queues, self.name, set(self._trees))
        for flow_run_id in found & self._suspects:
            await run_states.mark_crashed(self.client, flow_run_id, "Its worker is gone")
        self._suspects = found


def _end_on_sigterm() -> None:
    """Lets the first SIGTERM cancel the task that runs the worker, and a second one end the process.

    The handler of `prefect worker start` sends this process a SIGINT, which a process ignores that a shell has started
    in the background. Signals are left alone where the worker does not run in the main thread.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def end() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        if task is not None:
            task.cancel()

    if threading.current_thread() is threading.main_thread():
        loop.add_signal_handler(signal.SIGTERM, end)


def _log_path(flow_run: FlowRun) -> Path | None:
    """Returns where a run's output goes: a file for each work queue in WEIGHTLINE_LOG_DIR, if that is set."""
    folder = os.environ.get("WEIGHTLINE_LOG_DIR")
    return Path(folder) / f"queue-{flow_run.work_queue_name}.log" if folder else None
