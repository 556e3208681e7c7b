"""deployments/prefect.yaml deployed for real: a commit starts its consumers, and a lost event is made good."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from flows.reconcile import reconcile
from tasks.deploy import deploy_all, end_stale_runs
from tasks.lanes import LANES, WORK_POOL
from tasks.publish import announce_commit
from tests.chains import commit_state, nudged, random_state
from tests.flows.conftest import ROOT
from weightline.chain import open_chain

CONSUMERS = ("evaluate-version", "refresh-serving")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployed(server: str) -> Iterator[SyncPrefectClient]:
    """Everything of prefect.yaml is there; no worker is."""
    with pytest.MonkeyPatch.context() as patch, get_client(sync_client=True) as client:
        patch.setenv("PREFECT_API_URL", server)
        deploy_all(ROOT)
        yield client
        EventsWorker.drain_all()


def _runs(client: SyncPrefectClient, deployment: str, chain: str) -> list[FlowRun]:
    named = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    return [run for run in client.read_flow_runs(deployment_filter=named) if run.parameters.get("chain") == chain]


def _wait_for(read: Callable[[], Any], is_enough: Callable[[Any], bool], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not is_enough(found := read()):
        assert time.monotonic() < deadline, f"still {found}"
        time.sleep(0.2)
    return found


def test_a_commit_starts_evaluation_and_refresh_once_with_typed_parameters(deployed: SyncPrefectClient) -> None:
    chain = "memory://triggered"
    facts = {"version": 7, "commit_id": "ab" * 16, "kind": "delta", "stage": "sft", "run_id": "r"}
    for _ in range(3):
        announce_commit(chain, facts)
    for name in CONSUMERS:
        (run,) = _wait_for(lambda name=name: _runs(deployed, name, chain), bool)
        assert run.parameters == {"chain": chain, "version": 7}
        assert run.work_queue_name in {queue for lane in LANES for queue in lane.queues}
    announce_commit(chain, {**facts, "version": 8, "commit_id": "cd" * 16})
    for name in CONSUMERS:
        runs = _wait_for(lambda name=name: _runs(deployed, name, chain), lambda found: len(found) >= 2)
        assert sorted(run.parameters["version"] for run in runs) == [7, 8]


def test_other_events_start_nothing(deployed: SyncPrefectClient) -> None:
    payload = {"chain": "memory://other", "version": 1}
    emit_event("weightline.delta.committed", resource={"prefect.resource.id": "someone.else"}, payload=payload)
    announce_commit("memory://after-the-other", {"version": 0, "commit_id": "00" * 16})
    _wait_for(lambda: _runs(deployed, "evaluate-version", "memory://after-the-other"), bool)
    assert _runs(deployed, "evaluate-version", "memory://other") == []


def test_reconcile_starts_what_was_forgotten_and_starts_it_once(deployed: SyncPrefectClient) -> None:
    chain = open_chain("memory://forgotten")
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state)
    assert reconcile(chain=chain.url, grace_seconds=3600.0) == 0
    for _ in range(2):
        assert reconcile(chain=chain.url, grace_seconds=0.0) == 4
    for name in CONSUMERS:
        assert sorted(run.parameters["version"] for run in _runs(deployed, name, chain.url)) == [0, 1]


def test_deploying_again_changes_nothing_that_a_person_sees(deployed: SyncPrefectClient) -> None:
    before = {deployment.id for deployment in deployed.read_deployments()}
    deploy_all(ROOT)
    assert {deployment.id for deployment in deployed.read_deployments()} == before
    queues = {queue.name: queue.concurrency_limit for queue in deployed.read_work_queues(work_pool_name=WORK_POOL)}
    assert all(queues[queue] == 1 for lane in LANES for queue in lane.queues)
    announce_commit("memory://deployed-twice", {"version": 0, "commit_id": "11" * 16})
    (run,) = _wait_for(lambda: _runs(deployed, "evaluate-version", "memory://deployed-twice"), bool)
    assert run.parameters["version"] == 0


def test_what_an_earlier_stack_left_behind_is_cancelled(deployed: SyncPrefectClient) -> None:
    found = deployed.read_deployment_by_name("reconcile/reconcile")
    left_behind = deployed.create_flow_run_from_deployment(found.id, parameters={"chain": "memory://past"})
    assert end_stale_runs(deployed) >= 1
    state = deployed.read_flow_run(left_behind.id).state
    assert state is not None
    assert state.is_cancelled()
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    assert deployed.read_flow_runs(flow_run_filter=running) == []
