"""The worker type `weightline`, started as users start it: each run has a process of its own, and no end is missed."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
    WorkerFilter,
    WorkerFilterStatus,
)
from prefect.client.schemas.objects import FlowRun, State, WorkerStatus
from prefect.flows import Flow
from prefect.states import Cancelled, Cancelling, Pending

from tests import ROOT
from tests.deployments import toy_flows
from tests.prefect_server import Workers, workers_in
from tests.waiting import wait_until
from weightline.deployments.worker import run_states
from weightline.deployments.worker.warm_worker import WarmWorker

POOL = "toy-pool"


StartRun = Callable[..., UUID]


@pytest.fixture(scope="module")
def pool(server: str) -> None:
    """A work pool of the type, with the queue `toy`, which the shared worker serves, and the queue `other`."""
    template = WarmWorker.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type=WarmWorker.type, base_job_template=template))
        for queue in ("toy", "other"):
            client.create_work_queue(queue, work_pool_name=POOL)


@pytest.fixture
def start(client: SyncPrefectClient, pool: None) -> StartRun:
    """Deploys a toy flow to the pool and starts a run of it."""

    def start_flow(
        flow: Flow, job: dict[str, Any] | None = None, queue: str = "toy", state: State | None = None, **parameters: str
    ) -> UUID:
        deployment_id = client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name=f"toy-{queue}",
            entrypoint=f"{toy_flows.__name__}.{flow.fn.__name__}",
            work_pool_name=POOL,
            work_queue_name=queue,
            parameter_openapi_schema={},
            job_variables={"env": {"TOY_WORD": "deployed", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "77"}},
        )
        run = client.create_flow_run_from_deployment(
            deployment_id, parameters=parameters, job_variables=job, state=state
        )
        return run.id

    return start_flow


@pytest.fixture(scope="module")
def shared(server: str, pool: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One worker, `shared`, of the queue `toy` for several tests."""
    with workers_in(tmp_path_factory.mktemp("shared") / "workers", server) as workers:
        workers.start(POOL, "toy", "shared", PYTHONPATH=str(ROOT))
        yield workers


def _state(client: SyncPrefectClient, flow_run_id: UUID) -> State:
    state = client.read_flow_run(flow_run_id).state
    assert state is not None
    return state


def _ends(client: SyncPrefectClient, flow_run_ids: Sequence[UUID]) -> str:
    """How runs ended, as a message for assertions."""
    states = [_state(client, run) for run in flow_run_ids]
    return "\n".join(f"{run}: {state.name}: {state.message}" for run, state in zip(flow_run_ids, states, strict=True))


def _told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prefect_finds_the_worker_type(client: SyncPrefectClient, start: StartRun) -> None:
    assert "weightline" in WarmWorker.get_all_available_worker_types()
    assert WarmWorker.get_worker_class_from_type("weightline") is WarmWorker
    pool = client.read_work_pool(POOL)
    assert pool.type == "weightline"
    assert {"command", "env", "working_dir"} <= set(pool.base_job_template["variables"]["properties"])


def test_every_run_has_a_process_of_its_own_and_every_end_is_known(
    client: SyncPrefectClient, start: StartRun, shared: Workers, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    runs = [
        start(toy_flows.tell, path=str(told)),
        start(toy_flows.tell, {"env": {"TOY_WORD": "own"}, "working_dir": str(elsewhere)}, path=str(told)),
        start(toy_flows.tell, {"env": {"TOY_WORD": None}}, path=str(told)),
        start(toy_flows.tell, {"command": f"{sys.executable} -m prefect.engine"}, path=str(told)),
    ]
    failing, dying = start(toy_flows.fail), start(toy_flows.die)
    everything = [*runs, failing, dying]
    wait_until(lambda: all(_state(client, run).is_final() for run in everything), told=shared.output)

    assert [_state(client, run).name for run in runs] == ["Completed"] * 4, f"{_ends(client, runs)}\n{shared.output()}"
    facts = _told(told)
    assert len({one["pid"] for one in facts}) == 4
    assert {(one["word"], one["working_dir"]) for one in facts} == {
        ("deployed", str(ROOT)), ("own", str(elsewhere)), (None, str(ROOT)),
    }  # fmt: skip
    assert {one["heartbeat_seconds"] for one in facts} == {77}
    assert all(one["path_is_set"] and not one["found_toys"] for one in facts)
    forked = [one["parent"] for one in facts]
    (fork_server,) = {parent for parent in forked if forked.count(parent) == 3}
    assert psutil.Process(fork_server).ppid() == shared.processes["shared"].pid
    assert psutil.Process(fork_server).num_threads() == 1

    failed, crashed = _state(client, failing), _state(client, dying)
    assert failed.is_failed()
    assert "the toy broke" in (failed.message or "")
    assert crashed.is_crashed()
    assert "exit code 7" in (crashed.message or "")


@pytest.mark.parametrize("part", ["run", "subflow"])
def test_cancelling_a_run_or_a_part_of_it_ends_all_its_processes(
    client: SyncPrefectClient, start: StartRun, shared: Workers, tmp_path: Path, part: str
) -> None:
    told = tmp_path / "pid"
    hanging = start(toy_flows.hang, path=str(told))
    wait_until(lambda: told.exists() and told.read_text(), told=shared.output)
    child = psutil.Process(int(told.read_text()))
    (subflow,) = wait_until(lambda: _subflows(client, hanging), told=shared.output)
    client.set_flow_run_state(hanging if part == "run" else subflow.id, Cancelling())
    wait_until(lambda: _state(client, hanging).is_cancelled(), told=shared.output)
    wait_until(lambda: _state(client, subflow.id).is_cancelled(), told=shared.output)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def _subflows(client: SyncPrefectClient, flow_run_id: UUID) -> list[FlowRun]:
    of_run = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[flow_run_id]))
    return client.read_flow_runs(flow_run_filter=of_run)


def test_two_workers_keep_the_limit_of_a_queue_and_start_nothing_of_a_paused_one(
    client: SyncPrefectClient, start: StartRun, shared: Workers, workers: Workers, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    queue = client.read_work_queue_by_name("toy", work_pool_name=POOL)
    client.update_work_queue(queue.id, concurrency_limit=1)
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
    runs = [start(toy_flows.hold, path=str(told)) for _ in range(4)]
    workers.start(POOL, "toy", "second")
    try:
        wait_until(lambda: {"shared", "second"} <= _online(client), told=workers.output)
        _wait_for_polls(client, 3)
        assert all(_state(client, run).is_scheduled() for run in runs)
        client.update_work_queue(queue.id, is_paused=True)
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
        _wait_for_polls(client, 3)
        assert all(_state(client, run).is_scheduled() for run in runs)
        client.update_work_queue(queue.id, is_paused=False)
        wait_until(lambda: all(_state(client, run).is_completed() for run in runs), told=workers.output)
        assert told.read_text().splitlines() == ["begun", "ended"] * 4
    finally:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
        client.update_work_queue(queue.id, concurrency_limit=None, is_paused=False)


def _online(client: SyncPrefectClient) -> set[str]:
    online = WorkerFilter(status=WorkerFilterStatus(any_=[WorkerStatus.ONLINE]))
    return {worker.name for worker in client.read_workers_for_work_pool(POOL, worker_filter=online)}


def test_of_two_runs_that_were_claimed_for_one_slot_neither_starts_before_the_other_is_gone(
    client: SyncPrefectClient, start: StartRun
) -> None:
    queue = client.read_work_queue_by_name("other", work_pool_name=POOL)
    client.update_work_queue(queue.id, concurrency_limit=1)
    first, second = (start(toy_flows.fail, queue="other", state=Pending()) for _ in range(2))
    try:
        assert asyncio.run(_is_over_limit(first))
        assert asyncio.run(_is_over_limit(second))
        asyncio.run(_give_back(second))
        waiting = _state(client, second)
        assert waiting.is_scheduled()
        assert waiting.state_details.scheduled_time is not None
        assert not asyncio.run(_is_over_limit(first))
    finally:
        for run in (first, second):
            client.set_flow_run_state(run, Cancelled(), force=True)
        client.update_work_queue(queue.id, concurrency_limit=None)


async def _is_over_limit(flow_run_id: UUID) -> bool:
    async with get_client() as client:
        limits, flow_run = await run_states.read_limits(client, POOL), await client.read_flow_run(flow_run_id)
        return await run_states.is_over_limit(client, POOL, limits, flow_run)


async def _give_back(flow_run_id: UUID) -> None:
    async with get_client() as client:
        await run_states.give_back(client, flow_run_id)


def _wait_for_polls(client: SyncPrefectClient, number: int) -> None:
    """Until workers have asked for runs of the queue so many times."""
    for _ in range(number):
        before = _last_polled(client)
        wait_until(lambda before=before: _last_polled(client) != before)


def _last_polled(client: SyncPrefectClient) -> object:
    return client.read_work_queue_by_name("toy", work_pool_name=POOL).last_polled


def test_a_run_is_taken_for_lost_when_its_worker_is_gone_and_no_other(
    client: SyncPrefectClient, start: StartRun, shared: Workers, tmp_path: Path
) -> None:
    client.send_worker_heartbeat(POOL, "elsewhere", heartbeat_interval_seconds=300.0)
    takers = {start(toy_flows.fail, state=Pending()): name for name in ("killed", "shared", "elsewhere")}
    left_behind, of_namesake, living = takers
    for run, taker in takers.items():
        client.update_flow_run_labels(run, {"prefect.worker.name": taker})
    try:
        for run in (left_behind, of_namesake):
            wait_until(lambda run=run: _state(client, run).is_final(), told=shared.output)
            assert _state(client, run).is_crashed()
            assert _state(client, run).message == "Its worker is gone"
        assert _state(client, living).is_pending()
    finally:
        client.set_flow_run_state(living, Cancelled(), force=True)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """What is started meanwhile ignores SIGINT, as what a shell starts in the background."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_that_is_ended_takes_its_runs_along(
    client: SyncPrefectClient, start: StartRun, workers: Workers, tmp_path: Path, how: signal.Signals
) -> None:
    told = tmp_path / "pid"
    hanging = start(toy_flows.hang, queue="other", path=str(told))
    with _ignoring_interrupts():
        worker = workers.start(POOL, "other", "doomed")
    wait_until(lambda: told.exists() and told.read_text(), told=workers.output)
    (fork_server,) = psutil.Process(worker.pid).children()
    worker.send_signal(how)
    worker.wait()
    wait_until(lambda: not fork_server.is_running(), told=workers.output)
    if how is signal.SIGKILL:
        workers.start(POOL, "other", "heir")
    wait_until(lambda: _state(client, hanging).is_final(), told=workers.output)
    assert _state(client, hanging).is_crashed()


def test_a_fork_server_that_was_killed_is_started_again(
    client: SyncPrefectClient, start: StartRun, shared: Workers, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    worker = psutil.Process(shared.processes["shared"].pid)
    first = start(toy_flows.tell, path=str(told))
    wait_until(lambda: _state(client, first).is_completed(), told=shared.output)
    (fork_server,) = worker.children()
    fork_server.kill()
    (successor,) = wait_until(worker.children, lambda found: found not in ([], [fork_server]), told=shared.output)
    second = start(toy_flows.tell, path=str(told))
    wait_until(lambda: _state(client, second).is_completed(), told=shared.output)
    assert [one["parent"] for one in _told(told)] == [fork_server.pid, successor.pid]
