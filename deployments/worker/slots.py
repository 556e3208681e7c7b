"""The slots of work queues: which are free, and who holds the others. Only reads: what writes on every look makes the
server's database the bottleneck, and triggers late by minutes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkerFilter,
    WorkerFilterStatus,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkQueueFilter,
    WorkQueueFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, WorkerStatus
from prefect.states import Pending

#: The states that Prefect counts against the limits of pools and queues.
_HOLDING = [StateType.PENDING, StateType.RUNNING]
_TAKEN_BY = "Taken by "
#: What the server returns of one read at most. A runner has a slot or four: a larger limit is none to it.
_MOST_READ = 200


def taken_by(runner: str) -> State[None]:
    """The state that a runner claims a run with. It names the runner, for `orphans` to find."""
    return Pending(message=f"{_TAKEN_BY}{runner}")


def free_queues(client: SyncPrefectClient, pool: str, queues: Collection[str]) -> set[str]:
    """Those of the queues in which a run may start now, by the pauses and limits of pool and queues.

    To be asked after reading what waits. Then runners that all claim the oldest run keep a limit together: whoever does
    not see the run that took the last slot among those that hold one, still saw it waiting, and its claim is refused.
    """
    held = client.read_work_pool(pool)
    if held.is_paused or _is_full(client, held.concurrency_limit, pool, None):
        return set()
    named = WorkQueueFilter(name=WorkQueueFilterName(any_=list(queues)))
    found = client.read_work_queues(work_pool_name=pool, work_queue_filter=named)
    return {
        one.name for one in found if not one.is_paused and not _is_full(client, one.concurrency_limit, pool, [one.name])
    }


def _is_full(client: SyncPrefectClient, limit: int | None, pool: str, queues: list[str] | None) -> bool:
    if limit is None or limit > _MOST_READ:
        return False
    return limit == 0 or len(_holding(client, pool, queues, limit)) >= limit


def _holding(client: SyncPrefectClient, pool: str, queues: list[str] | None, limit: int | None = None) -> list[FlowRun]:
    """Runs that hold slots of these queues (None: of any of the pool)."""
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_HOLDING))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        work_queue_filter=None if queues is None else WorkQueueFilter(name=WorkQueueFilterName(any_=queues)),
        limit=limit,
    )


def orphans(
    client: SyncPrefectClient, pool: str, queues: Collection[str], runner: str, own: Collection[str]
) -> set[UUID]:
    """Runs that hold slots of these queues, and whose runner is offline, by the server's word.

    `runner` asks, and knows of its `own` runs: another that bears its name was claimed, and the answer was lost. Runs
    that another kind of worker claimed are never among them.
    """
    holding = _holding(client, pool, list(queues))
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    alive = {worker.name for worker in client.read_workers_for_work_pool(pool, worker_filter=online)}
    takers = {run.id: taker_of(client.read_flow_run_states(run.id)) for run in holding if str(run.id) not in own}
    return {run_id for run_id, taker in takers.items() if taker and (taker == runner or taker not in alive)}


def taker_of(states: Iterable[State[object]]) -> str | None:
    """The runner that claimed the run last, from the run's states. None for another kind of worker."""
    by_time = sorted(states, key=lambda state: state.timestamp)
    claims = [state.message or "" for state in by_time if state.is_pending()]
    return claims[-1].removeprefix(_TAKEN_BY) if claims and claims[-1].startswith(_TAKEN_BY) else None
