"""A worker of the work pool that keeps its processes warm.

python -m weightline.deployments.worker.warm_runner [LANE...]

Prefect's own worker starts a process a flow run: 5 to 15 s of CPU for importing torch and the evaluation harness, on
the two cores that train. This one starts a process a lane (weightline.deployments.worker.work_queues) and hands it one
flow run after another. To the server it is a worker like any other: it keeps the limits and pauses of pool and queues,
claims a scheduled run by proposing Pending (the server lets one claimant win), sends heartbeats, cancels on request,
and marks a run whose process died as Crashed. The pool's own offer is not asked for: that writes on every look.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import Abort, ObjectNotFound, Pause
from prefect.states import Cancelled, Crashed
from prefect.utilities.engine import propose_state_sync

from weightline.deployments.worker.slots import free_queues, orphans, taken_by
from weightline.deployments.worker.warm_process import Ending, WarmWorker
from weightline.deployments.worker.work_queues import WORK_POOL, WaitingRun, choose_runs, lanes_named
from weightline.errors import InputError

logger = logging.getLogger("weightline.runner")

POLL_SECONDS = 0.3
_CANCEL_POLL_SECONDS = 2.0
_HEARTBEAT_SECONDS = 30.0
_AWAY_SECONDS = 2.0
#: How often the pool is asked again for runs that it has held back: they are over a limit, or paused.
_HELD_BACK_SECONDS = 2.0
#: Enough to find the oldest of every lane; how many wait does not matter.
_MAX_READ = 50


class WarmRunner:
    """Polls the pool for its lanes. `run` returns when `stop` was called."""

    def __init__(self, client: SyncPrefectClient, workers: list[WarmWorker], pool: str = WORK_POOL) -> None:
        self._client = client
        self._workers = workers
        self._pool = pool
        # A container that is started again has the host name and pid of the one before.
        token = f"{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self._name = f"warm {'+'.join(worker.lane.name for worker in workers)} {socket.gethostname()} {token}"
        self._endings: list[Ending] = []
        self._next: dict[str, float] = {}
        self._held_back: set[str] = set()
        self._suspects: set[UUID] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Ask `run` to return. May be called from a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        """Serve the lanes. A server that is away is asked again every two seconds; runs under way go on meanwhile."""
        while not self._is_stopping:
            try:
                self.turn()
            except (httpx.HTTPError, ObjectNotFound) as error:
                logger.warning("the server is away or has no pool %s: %r", self._pool, error)
                time.sleep(_AWAY_SECONDS)
            self._wait(POLL_SECONDS)

    def turn(self) -> None:
        """One look at everything: what ended, what is to be cancelled, what may start."""
        self._endings += [ending for worker in self._workers if (ending := worker.poll())]
        while self._endings:
            self._report(self._endings[0])
            del self._endings[0]
        if self._is_due("heartbeat", _HEARTBEAT_SECONDS):
            self._show_up()
            self._free_slots()
        if self._is_due("cancel", _CANCEL_POLL_SECONDS):
            self._cancel_on_request()
        self._start_runs()

    def close(self) -> None:
        """End all processes; runs under way are marked as crashed."""
        for worker in self._workers:
            flow_run_id = worker.flow_run_id
            worker.close()
            if flow_run_id is not None:
                self._mark_unfinished(UUID(flow_run_id), "The runner was stopped")

    def _show_up(self) -> None:
        """Let the server know that the pool has a worker and its queues are polled: the UI says so."""
        self._client.send_worker_heartbeat(self._pool, self._name, heartbeat_interval_seconds=_HEARTBEAT_SECONDS)
        queues = _queues_of(self._workers)
        # The offer is what says so; long past, since nothing of it is taken.
        long_past = datetime.now(UTC) - timedelta(days=365)
        self._client.get_scheduled_flow_runs_for_work_pool(self._pool, queues, scheduled_before=long_past)

    def _free_slots(self) -> None:
        """Where runs wait for slots, mark those as crashed that hold slots for a runner that is gone.

        At the second look: after the server was away, every runner is offline for a moment.
        """
        queues = _queues_of(self._workers)
        own = {worker.flow_run_id for worker in self._workers if worker.flow_run_id is not None}
        found = orphans(self._client, self._pool, queues, self._name, own) if self._held_back else set()
        for flow_run_id in found & self._suspects:
            self._mark_unfinished(flow_run_id, "Its runner is gone")
        self._suspects = found

    def _start_runs(self) -> None:
        idle = [worker for worker in self._workers if worker.is_idle]
        chosen = choose_runs([worker.lane for worker in idle], self._startable_runs(idle)) if idle else {}
        for worker in idle:
            run = chosen.get(worker.lane.name)
            if run is not None and self._claim(UUID(run.flow_run_id)):
                worker.give(run.flow_run_id)

    def _startable_runs(self, idle: list[WarmWorker]) -> list[WaitingRun]:
        """What is due in the idle lanes' queues and may start, by the limits and pauses of pool and queues."""
        waiting = self._waiting_runs(idle)
        ids = {run.flow_run_id for run in waiting}
        if not ids or (ids == self._held_back and not self._is_due("held back", _HELD_BACK_SECONDS)):
            return []
        free = free_queues(self._client, self._pool, {run.queue for run in waiting})
        startable = [run for run in waiting if run.queue in free]
        self._held_back = set() if startable else ids
        return startable

    def _waiting_runs(self, idle: list[WarmWorker]) -> list[WaitingRun]:
        """What is due in the idle lanes' queues, held back or not."""
        queues = _queues_of(idle)
        found = self._client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
            ),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self._pool])),
            work_queue_filter=WorkQueueFilter(name=WorkQueueFilterName(any_=queues)),
            sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
            limit=_MAX_READ,
        )
        return [
            WaitingRun(str(run.id), run.work_queue_name or "", run.next_scheduled_start_time.timestamp())
            for run in found
            if run.next_scheduled_start_time is not None
        ]

    def _claim(self, flow_run_id: UUID) -> bool:
        """Whether the run is ours. Another worker may have been faster, or a person may have cancelled it."""
        try:
            return propose_state_sync(self._client, taken_by(self._name), flow_run_id).is_pending()
        except (Abort, Pause, ObjectNotFound):
            return False

    def _report(self, ending: Ending) -> None:
        flow_run_id = UUID(ending.flow_run_id)
        if ending.how == "died":
            logger.error("the process of flow run %s died with exit code %s", flow_run_id, ending.returncode)
        message = "Its process returned without a final state" if ending.how == "returned" else (
            f"Its process died with exit code {ending.returncode}"
        )  # fmt: skip
        self._mark_unfinished(flow_run_id, message)

    def _mark_unfinished(self, flow_run_id: UUID, message: str) -> None:
        """Mark the run, and its subflows, as crashed unless their own process has brought them to an end."""
        try:
            for one in (flow_run_id, *(subflow.id for subflow in self._subflows(flow_run_id))):
                state = self._client.read_flow_run(one).state
                if state is not None and (state.is_pending() or state.is_running()):
                    propose_state_sync(self._client, Crashed(message=message), one)
        except (Abort, Pause, ObjectNotFound):
            return

    def _cancel_on_request(self) -> None:
        for worker in self._workers:
            worker.observe()
            if worker.flow_run_id is None:
                continue
            flow_run_id = UUID(worker.flow_run_id)
            state = self._client.read_flow_run(flow_run_id).state
            subflows = self._subflows(flow_run_id)
            # A stage is cancelled on its own page; it is a part of the run's process, and goes with it.
            states = [state, *(subflow.state for subflow in subflows)]
            if any(one is not None and (one.is_cancelling() or one.is_cancelled()) for one in states):
                logger.info("cancelling flow run %s", flow_run_id)
                worker.end_run()
                self._mark_cancelled([flow_run_id, *(subflow.id for subflow in subflows)])

    def _subflows(self, flow_run_id: UUID) -> list[FlowRun]:
        """Runs that end with this one, as long as it is under way."""
        of_run = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
        found = self._client.read_flow_runs(flow_run_filter=of_run)
        return [run for run in found if run.state is None or not run.state.is_final()]

    def _mark_cancelled(self, flow_run_ids: list[UUID]) -> None:
        """Their own processes may have said that they crashed, which is not the cause."""
        for flow_run_id in flow_run_ids:
            self._client.set_flow_run_state(flow_run_id, Cancelled(message="Cancelled on request"), force=True)

    def _is_due(self, what: str, interval_seconds: float) -> bool:
        if time.monotonic() < self._next.get(what, 0.0):
            return False
        self._next[what] = time.monotonic() + interval_seconds
        return True

    def _wait(self, seconds: float) -> None:
        """Until a run ends, at most so long."""
        fds = [worker.reply_fd for worker in self._workers if worker.flow_run_id and worker.reply_fd is not None]
        select.select(fds, [], [], seconds)


def _queues_of(workers: Iterable[WarmWorker]) -> list[str]:
    return [queue for worker in workers for queue in worker.lane.queues]


def main(argv: list[str]) -> None:
    """Serve the lanes named, or all, until SIGTERM or Ctrl-C. WEIGHTLINE_LOG_DIR takes a log file a lane."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        lanes = lanes_named(argv)
    except InputError as error:
        sys.exit(f"error: {error}")
    log_dir = os.environ.get("WEIGHTLINE_LOG_DIR")
    logs = {lane.name: Path(log_dir) / f"lane-{lane.name}.log" if log_dir else None for lane in lanes}
    workers = [WarmWorker(lane, logs[lane.name]) for lane in lanes]
    with get_client(sync_client=True) as client:
        runner = WarmRunner(client, workers)
        signal.signal(signal.SIGTERM, lambda *_: runner.stop())
        signal.signal(signal.SIGINT, lambda *_: runner.stop())
        try:
            runner.run()
        finally:
            runner.close()


if __name__ == "__main__":
    main(sys.argv[1:])
