"""The warm runner as a worker of a pool: one process runs run after run, and no end of a run goes unnoticed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentFlowRunId
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectAlreadyExists
from prefect.flows import Flow
from prefect.states import Cancelled, Cancelling

from tests.deployments import toy_flows
from tests.waiting import wait_until
from weightline.deployments.worker.slots import taken_by
from weightline.deployments.worker.warm_process import WarmWorker
from weightline.deployments.worker.warm_runner import WarmRunner
from weightline.deployments.worker.work_queues import LANES, Lane, WaitingRun, choose_runs, lanes_named
from weightline.errors import InputError

POOL = "toy-pool"


@pytest.fixture
def start(client: SyncPrefectClient) -> Callable[..., UUID]:
    """Deploys a toy flow to the pool's queue `toy` and starts a run of it."""
    try:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        client.create_work_queue("toy", work_pool_name=POOL)
    except ObjectAlreadyExists:
        pass

    def start_flow(flow: Flow, job: dict[str, Any] | None = None, **parameters: str) -> UUID:
        deployment_id = client.create_deployment(
            flow_id=client.create_flow_from_name(flow.name),
            name="toy",
            entrypoint=f"{toy_flows.__name__}.{flow.fn.__name__}",
            work_pool_name=POOL,
            work_queue_name="toy",
            parameter_openapi_schema={},
            job_variables={"env": {"TOY_WORD": "deployed", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "77"}},
        )
        return client.create_flow_run_from_deployment(deployment_id, parameters=parameters, job_variables=job).id

    return start_flow


@pytest.fixture
def run_until(client: SyncPrefectClient, tmp_path: Path, server_environment: None) -> Iterator[Callable[..., None]]:
    """Turns runners of one lane until something holds."""
    runners: list[WarmRunner] = []

    def turn_until(is_reached: Callable[[], bool], num_runners: int = 1) -> None:
        while len(runners) < num_runners:
            runners.append(WarmRunner(client, [WarmWorker(Lane("toy", ("toy",)), tmp_path / "lane.log")], POOL))
        wait_until(is_reached, meanwhile=turn, told=(tmp_path / "lane.log").read_text, every_seconds=0.1)

    def turn() -> None:
        for runner in runners:
            runner.turn()

    yield turn_until
    for runner in runners:
        runner.close()


@pytest.fixture
def limit(client: SyncPrefectClient, start: Callable[..., UUID]) -> Iterator[Callable[..., None]]:
    """Changes the queue `toy`: its limit, whether it is paused. All is as it was afterwards."""
    queue = client.read_work_queue_by_name("toy", work_pool_name=POOL)
    yield lambda **changes: client.update_work_queue(queue.id, **changes)
    client.update_work_queue(queue.id, concurrency_limit=None, is_paused=False)


def _state(client: SyncPrefectClient, flow_run_id: UUID) -> State:
    state = client.read_flow_run(flow_run_id).state
    assert state is not None
    return state


def test_runs_share_a_process_until_one_dies_and_every_end_is_told(
    client: SyncPrefectClient, start: Callable[..., UUID], run_until: Callable[..., None], tmp_path: Path
) -> None:
    told = tmp_path / "told"
    first, failing, second = (
        start(toy_flows.tell, path=str(told)),
        start(toy_flows.fail),
        start(toy_flows.tell, path=str(told)),
    )
    runs = [first, failing, second]
    run_until(lambda: all(_state(client, run).is_final() for run in runs))
    assert _state(client, first).is_completed()
    assert _state(client, second).is_completed()
    failed = _state(client, failing)
    assert failed.is_failed()
    assert "the toy broke" in (failed.message or "")
    pids = told.read_text().split()
    assert len(pids) == 2
    assert len(set(pids)) == 1

    dying = start(toy_flows.die)
    run_until(lambda: _state(client, dying).is_final())
    crashed = _state(client, dying)
    assert crashed.is_crashed()
    assert "exit code 7" in (crashed.message or "")

    third = start(toy_flows.tell, path=str(told))
    run_until(lambda: _state(client, third).is_final())
    assert _state(client, third).is_completed()
    assert told.read_text().split()[-1] != pids[0]


def test_cancelling_a_run_ends_all_its_processes(
    client: SyncPrefectClient, start: Callable[..., UUID], run_until: Callable[..., None], tmp_path: Path
) -> None:
    told = tmp_path / "pid"
    hanging = start(toy_flows.hang, path=str(told))
    run_until(lambda: told.exists() and bool(told.read_text()))
    child = psutil.Process(int(told.read_text()))
    of_hanging = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[hanging]))
    run_until(lambda: bool(client.read_flow_runs(flow_run_filter=of_hanging)))
    client.set_flow_run_state(hanging, Cancelling())
    run_until(lambda: _state(client, hanging).is_final())
    assert _state(client, hanging).is_cancelled()
    (subflow,) = client.read_flow_runs(flow_run_filter=of_hanging)
    run_until(lambda: _state(client, subflow.id).is_cancelled())
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_cancelling_a_part_of_a_run_ends_the_run(
    client: SyncPrefectClient, start: Callable[..., UUID], run_until: Callable[..., None], tmp_path: Path
) -> None:
    told = tmp_path / "pid"
    hanging = start(toy_flows.hang, path=str(told))
    run_until(lambda: told.exists() and bool(told.read_text()))
    of_hanging = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[hanging]))
    run_until(lambda: bool(client.read_flow_runs(flow_run_filter=of_hanging)))
    (subflow,) = client.read_flow_runs(flow_run_filter=of_hanging)
    client.set_flow_run_state(subflow.id, Cancelling())
    run_until(lambda: _state(client, hanging).is_final())
    assert _state(client, hanging).is_cancelled()
    run_until(lambda: _state(client, subflow.id).is_cancelled())
    child = int(told.read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_two_runners_keep_the_limit_of_a_queue_and_its_job_variables(
    client: SyncPrefectClient,
    start: Callable[..., UUID],
    run_until: Callable[..., None],
    limit: Callable[..., None],
    tmp_path: Path,
) -> None:
    limit(concurrency_limit=1)
    told = tmp_path / "told"
    runs = [start(toy_flows.hold, path=str(told)) for _ in range(3)]
    runs.append(start(toy_flows.hold, {"env": {"TOY_WORD": "own"}}, path=str(told)))
    run_until(lambda: all(_state(client, run).is_final() for run in runs), num_runners=2)
    words = ["deployed", "deployed", "deployed", "own"]
    assert told.read_text().splitlines() == [f"{moment} {word} 77" for word in words for moment in ("begun", "ended")]


def test_nothing_starts_while_the_queue_or_the_pool_is_paused(
    client: SyncPrefectClient,
    start: Callable[..., UUID],
    run_until: Callable[..., None],
    limit: Callable[..., None],
    tmp_path: Path,
) -> None:
    told = tmp_path / "told"
    limit(is_paused=True)
    waiting = start(toy_flows.tell, path=str(told))

    def let_pass(seconds: float) -> None:
        until = time.monotonic() + seconds
        run_until(lambda: time.monotonic() > until)

    let_pass(3.0)
    assert _state(client, waiting).is_scheduled()
    client.update_work_pool(POOL, WorkPoolUpdate(is_paused=True))
    try:
        limit(is_paused=False)
        let_pass(3.0)
        assert _state(client, waiting).is_scheduled()
    finally:
        client.update_work_pool(POOL, WorkPoolUpdate(is_paused=False))
    run_until(lambda: _state(client, waiting).is_completed())


def test_a_slot_is_taken_from_a_run_whose_runner_is_gone_and_from_no_other(
    client: SyncPrefectClient,
    start: Callable[..., UUID],
    run_until: Callable[..., None],
    limit: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("weightline.deployments.worker.warm_runner._HEARTBEAT_SECONDS", 1.0)
    limit(concurrency_limit=2)
    left_behind, living, waiting = (start(toy_flows.tell, path=str(tmp_path / "told")) for _ in range(3))
    client.send_worker_heartbeat(POOL, "a runner elsewhere", heartbeat_interval_seconds=300.0)
    client.set_flow_run_state(left_behind, taken_by("a runner that was killed"))
    client.set_flow_run_state(living, taken_by("a runner elsewhere"))
    try:
        run_until(lambda: _state(client, waiting).is_completed())
        crashed = _state(client, left_behind)
        assert crashed.is_crashed()
        assert crashed.message == "Its runner is gone"
        assert _state(client, living).is_pending()
    finally:
        client.set_flow_run_state(living, Cancelled(), force=True)


def test_every_idle_lane_takes_the_run_that_waited_longest_in_its_queues() -> None:
    first, second = Lane("first", ("a", "b")), Lane("second", ("c",))
    waiting = [
        WaitingRun("late", "a", 30.0), WaitingRun("early", "b", 10.0), WaitingRun("other", "c", 20.0),
        WaitingRun("nobody's", "d", 1.0),
    ]  # fmt: skip
    chosen = choose_runs([first, second], waiting)
    assert {lane: run.flow_run_id for lane, run in chosen.items()} == {"first": "early", "second": "other"}
    assert choose_runs([], waiting) == {}
    assert choose_runs([second], waiting[:2]) == {}


def test_lanes_go_by_name() -> None:
    assert lanes_named([]) == LANES
    assert [lane.name for lane in lanes_named(["serving"])] == ["serving"]
    with pytest.raises(InputError, match="no lane is called 'typo'"):
        lanes_named(["typo"])
