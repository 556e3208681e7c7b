"""Reads and changes the states of flow runs for a worker: due, over a limit, cancelled, crashed, orphaned."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterParentFlowRunId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkerFilter,
    WorkerFilterStatus,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, StateType, WorkerStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed, Scheduled

#: The label with which a Prefect worker marks a run that it has claimed.
_WORKER_LABEL = "prefect.worker.name"
#: After this time, a claimed run without that label is orphaned: its worker ended between claiming and labeling it.
_UNLABELLED_FOR = timedelta(minutes=5)
#: The server returns at most this many runs at once. A worker treats limits of this size as no limit.
_MANY = 200


async def due_runs(client: PrefectClient, pool: str, queues: Sequence[str]) -> set[UUID]:
    """Returns some of the due runs of these queues (none: of all), including those that a limit holds back."""
    found = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
        ),
        **_of(pool, queues),
        limit=_MANY,
    )
    return {run.id for run in found}


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of runs of a pool, and of each of its queues, that may hold a slot. None: any number."""

    pool: int | None
    by_queue: Mapping[str, int | None]


async def read_limits(client: PrefectClient, pool: str) -> Limits:
    """Returns the limits that pool and queues have now."""
    queues = await client.read_work_queues(work_pool_name=pool)
    limit = (await client.read_work_pool(pool)).concurrency_limit
    return Limits(limit, {queue.name: queue.concurrency_limit for queue in queues})


async def is_over_limit(client: PrefectClient, pool: str, limits: Limits, flow_run: FlowRun) -> bool:
    """Returns whether a run that was just claimed must be given back, because others hold all slots.

    The server offers runs within the limits of pool and queue. But two workers that ask at the same moment are offered
    different runs for one slot, because the server leaves out rows that another request has locked. Each worker claims
    its run and then counts the claimed runs, so that the later of two workers always counts the run of the earlier.
    """
    queue = flow_run.work_queue_name or ""
    for limit, queues in ((limits.pool, ()), (limits.by_queue.get(queue), (queue,))):
        if limit is not None and limit < _MANY:
            holding = await _holding_a_slot(client, pool, queues)
            if sum(run.id != flow_run.id for run in holding) >= limit:
                return True
    return False


async def give_back(client: PrefectClient, flow_run_id: UUID) -> None:
    """Reschedules a claimed run after a random pause, since two workers may give back to each other."""
    later = datetime.now(UTC) + timedelta(seconds=random.uniform(0.5, 3.0))
    await client.set_flow_run_state(flow_run_id, Scheduled(scheduled_time=later), force=True)


async def open_subflows(client: PrefectClient, flow_run_id: UUID) -> list[FlowRun]:
    """Returns the run's subflows that have not ended. They run in its process and end with it."""
    of_run = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
    found = await client.read_flow_runs(flow_run_filter=of_run)
    return [run for run in found if run.state is None or not run.state.is_final()]


async def runs_to_cancel(client: PrefectClient, flow_run_id: UUID) -> list[UUID]:
    """Returns the run and its subflows when the cancellation of any of them is requested; else nothing."""
    run = await client.read_flow_run(flow_run_id)
    runs = [run, *await open_subflows(client, flow_run_id)]
    states = [one.state for one in runs if one.state is not None]
    return [one.id for one in runs] if any(one.is_cancelling() or one.is_cancelled() for one in states) else []


async def mark_cancelled(client: PrefectClient, flow_run_ids: Iterable[UUID]) -> None:
    """Marks the runs as cancelled, even if their process reported a crash when it was ended."""
    for flow_run_id in flow_run_ids:
        with suppress(ObjectNotFound):
            await client.set_flow_run_state(flow_run_id, Cancelled(message="Cancelled on request"), force=True)


async def mark_crashed(client: PrefectClient, flow_run_id: UUID, message: str) -> None:
    """Marks the run and its subflows as crashed, except those that have ended or were deleted. Safe to repeat."""
    with suppress(ObjectNotFound):
        for one in (flow_run_id, *(subflow.id for subflow in await open_subflows(client, flow_run_id))):
            state = (await client.read_flow_run(one)).state
            if state is not None and (state.is_pending() or state.is_running()):
                await client.set_flow_run_state(one, Crashed(message=message))


async def find_orphans(
    client: PrefectClient, pool: str, queues: Sequence[str], worker: str, own: set[UUID]
) -> set[UUID]:
    """Returns the runs of these queues (none: of all) that hold a slot for a worker that is gone.

    `worker` is the name of the calling worker, and `own` are the runs that it executes. Any other run under its name
    belonged to an earlier process.
    """
    holding = await _holding_a_slot(client, pool, queues)
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    workers = await client.read_workers_for_work_pool(pool, worker_filter=online)
    living = {one.name for one in workers} - {worker}
    return {run.id for run in holding if run.id not in own and _is_orphan(run, living, datetime.now(UTC))}


async def _holding_a_slot(client: PrefectClient, pool: str, queues: Sequence[str]) -> list[FlowRun]:
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
    return await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state), **_of(pool, queues), limit=_MANY)


def _of(pool: str, queues: Sequence[str]) -> dict[str, Any]:
    """Returns the filters of a pool and, if there are any, of its queues."""
    names = WorkQueueFilterName(any_=list(queues))
    return {
        "work_pool_filter": WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        "work_queue_filter": WorkQueueFilter(name=names) if queues else None,
    }


def _is_orphan(run: FlowRun, living_workers: set[str], now: datetime) -> bool:
    taker = run.labels.get(_WORKER_LABEL)
    if taker is not None:
        return taker not in living_workers
    state = run.state
    return state is not None and state.is_pending() and now - state.timestamp > _UNLABELLED_FOR
