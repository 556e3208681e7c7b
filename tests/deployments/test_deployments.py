"""deployments/prefect.yaml deployed for real: a commit starts its consumers, and a lost event is made good."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun, StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import emit_event
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Crashed, Failed, Scheduled

from tests import ROOT
from tests.chains import commit_state, nudged, random_state
from tests.waiting import wait_until
from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, read_records
from weightline.deployments.prefect_private import drain_events
from weightline.deployments.server.deploy import deploy_all, end_stale_runs
from weightline.deployments.server.events import announce_commit
from weightline.deployments.worker import WORK_POOL, WORK_QUEUES
from weightline.flows.reconcile import reconcile
from weightline.format import keys
from weightline.format.manifest import Manifest
from weightline.lineage.owed import MAX_ATTEMPTS

CONSUMERS = ("evaluate-version", "refresh-serving")


@pytest.fixture(scope="module")
def deployed(server: str) -> Iterator[SyncPrefectClient]:
    """Everything of prefect.yaml is there; no worker is."""
    with pytest.MonkeyPatch.context() as patch, get_client(sync_client=True) as client:
        patch.setenv("PREFECT_API_URL", server)
        deploy_all()
        yield client
        drain_events()


def _runs(client: SyncPrefectClient, deployment: str, chain: str) -> list[FlowRun]:
    named = DeploymentFilter(name=DeploymentFilterName(any_=[deployment]))
    return [run for run in client.read_flow_runs(deployment_filter=named) if run.parameters.get("chain") == chain]


def _committed(chain: str, version: int) -> Manifest:
    """A manifest of that version of a chain that is never read."""
    manifest = commit_state(open_chain(f"{chain}/of-v{version}"), random_state(0))
    return manifest.model_copy(update={"version": version})


def test_a_commit_starts_evaluation_and_refresh_once_with_typed_parameters(deployed: SyncPrefectClient) -> None:
    chain = "memory://triggered"
    seventh = _committed(chain, 7)
    for _ in range(3):
        announce_commit(chain, seventh)
    for name in CONSUMERS:
        (run,) = wait_until(lambda name=name: _runs(deployed, name, chain), bool)
        assert run.parameters == {"chain": chain, "version": 7, "or_newer": True}
        assert run.work_queue_name in WORK_QUEUES
    announce_commit(chain, _committed(chain, 8))
    for name in CONSUMERS:
        runs = wait_until(lambda name=name: _runs(deployed, name, chain), lambda found: len(found) >= 2)
        assert sorted(run.parameters["version"] for run in runs) == [7, 8]


def test_other_events_start_nothing(deployed: SyncPrefectClient) -> None:
    payload = {"chain": "memory://other", "version": 1}
    emit_event("weightline.delta.committed", resource={"prefect.resource.id": "someone.else"}, payload=payload)
    announce_commit("memory://after-the-other", _committed("memory://after-the-other", 0))
    wait_until(lambda: _runs(deployed, "evaluate-version", "memory://after-the-other"), bool)
    assert _runs(deployed, "evaluate-version", "memory://other") == []


def _committed_unheard(name: str) -> Chain:
    chain = open_chain(f"memory://{name}")
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state)
    return chain


def test_commits_while_the_server_is_down_are_made_good(deployed: SyncPrefectClient, tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "unheard").as_uri())
    down = {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    subprocess.run(
        [sys.executable, "-m", "tests.deployments.unheard_commits", chain.url], env=down, cwd=ROOT, check=True
    )
    assert reconcile(chains=[chain.url], grace_seconds=3600.0) == 0
    assert reconcile(chains=[chain.url], grace_seconds=0.0) == 2  # both are announced, and that starts the consumers
    for name in CONSUMERS:
        runs = wait_until(lambda name=name: _runs(deployed, name, chain.url), lambda found: len(found) >= 2)
        assert sorted(run.parameters["version"] for run in runs) == [0, 1]
    assert reconcile(chains=[chain.url], grace_seconds=0.0) == 0  # known, and under way


def test_what_an_announcement_did_not_start_is_started_once(deployed: SyncPrefectClient) -> None:
    chain = _committed_unheard("forgotten")
    for manifest in chain.manifests():
        announce_commit(chain.url, manifest)
    for name in CONSUMERS:
        for run in wait_until(lambda name=name: _runs(deployed, name, chain.url), lambda found: len(found) >= 2):
            deployed.set_flow_run_state(run.id, Crashed(), force=True)
    for _ in range(2):
        assert reconcile(chains=[chain.url], grace_seconds=0.0) in (4, 0)
    for name in CONSUMERS:
        waiting = [run for run in _runs(deployed, name, chain.url) if run.state and run.state.is_scheduled()]
        assert sorted(run.parameters["version"] for run in waiting) == [0, 1]


def test_a_chain_that_cannot_be_read_costs_the_others_nothing(deployed: SyncPrefectClient) -> None:
    torn, good = _committed_unheard("torn-chain"), _committed_unheard("good-chain")
    torn.store.put(keys.commit(0), b"{torn")
    with pytest.raises(ExceptionGroup, match=r"memory://torn-chain: .*; ftp://nowhere: "):
        reconcile(chains=[torn.url, "ftp://nowhere", good.url], grace_seconds=0.0)
    for name in CONSUMERS:
        runs = wait_until(lambda name=name: _runs(deployed, name, good.url), lambda found: len(found) >= 2)
        assert sorted(run.parameters["version"] for run in runs) == [0, 1]
        (run,) = wait_until(lambda name=name: _runs(deployed, name, torn.url), bool)
        assert run.parameters["version"] == 1


def test_what_fails_for_good_is_written_down_and_not_started_again(
    deployed: SyncPrefectClient,
) -> None:
    chain = _committed_unheard("exhausted")
    for manifest in chain.manifests():
        announce_commit(chain.url, manifest)
    for tried in range(MAX_ATTEMPTS + 1):
        for name in CONSUMERS:
            runs = wait_until(lambda name=name: _runs(deployed, name, chain.url), lambda found: len(found) >= 2)
            assert len(runs) == 2 * (tried + 1)
            for run in (run for run in runs if run.state and not run.state.is_final()):
                deployed.set_flow_run_state(run.id, Failed(message="no such task"), force=True)
        assert reconcile(chains=[chain.url], grace_seconds=0.0, retry_seconds=0.0) == (4 if tried < MAX_ATTEMPTS else 0)
    for kind in (EVALUATIONS, REFRESHES):
        records = read_records(chain, kind)
        assert [(record["version"], record["status"]) for record in records] == [(0, "failed"), (1, "failed")]
        assert all("no such task" in record["reason"] for record in records)
    for version in (0, 1):
        chain.store.put(keys.commit(version), b"nobody reads a version that has its records")
    assert reconcile(chains=[chain.url], grace_seconds=0.0) == 0


@pytest.mark.parametrize(
    ("name", "wrong", "field"),
    [
        ("evaluate-version/evaluate-version", {"chain": "memory://x", "version": -3}, "version"),
        ("post-training/post-training", {"stages": ["ppo"]}, "stages"),
        ("maintain-chain/maintain-chain", {"chain": "memory://x", "keep_versions": 0}, "keep_versions"),
        ("publish-model/publish-model", {"version": "tip"}, "chain"),
    ],
)
def test_the_server_refuses_a_wrong_value_and_names_the_field(
    deployed: SyncPrefectClient, name: str, wrong: dict[str, Any], field: str
) -> None:
    found = deployed.read_deployment_by_name(name)
    with pytest.raises(PrefectHTTPStatusError, match=field):
        deployed.create_flow_run_from_deployment(found.id, parameters=wrong)


def test_nightly_training_is_off_until_it_is_switched_on(deployed: SyncPrefectClient) -> None:
    found = deployed.read_deployment_by_name("post-training/post-training")
    (nightly,) = found.schedules
    assert not nightly.active
    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    named = DeploymentFilter(name=DeploymentFilterName(any_=["post-training"]))

    def runs_of_the_schedule() -> list[FlowRun]:
        runs = deployed.read_flow_runs(deployment_filter=named, flow_run_filter=scheduled)
        return [run for run in runs if run.auto_scheduled]

    reconciled = DeploymentFilter(name=DeploymentFilterName(any_=["reconcile"]))
    wait_until(lambda: deployed.read_flow_runs(deployment_filter=reconciled, flow_run_filter=scheduled), bool)
    assert runs_of_the_schedule() == []
    deployed.update_deployment_schedule(found.id, nightly.id, active=True)
    run = wait_until(runs_of_the_schedule, bool)[0]
    assert run.work_queue_name == "training"
    assert run.expected_start_time is not None
    assert run.expected_start_time.hour == 2
    deployed.update_deployment_schedule(found.id, nightly.id, active=False)


def test_deploying_again_changes_nothing_that_a_person_sees(deployed: SyncPrefectClient) -> None:
    before = {deployment.id for deployment in deployed.read_deployments()}
    done = subprocess.run(
        [sys.executable, "-m", "weightline", "deploy"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert os.environ["PREFECT_API_URL"] in done.stdout
    assert {deployment.id for deployment in deployed.read_deployments()} == before
    queues = {queue.name: queue.concurrency_limit for queue in deployed.read_work_queues(work_pool_name=WORK_POOL)}
    assert all(queues[queue] == 1 for queue in WORK_QUEUES)
    announce_commit("memory://deployed-twice", _committed("memory://deployed-twice", 0))
    (run,) = wait_until(lambda: _runs(deployed, "evaluate-version", "memory://deployed-twice"), bool)
    assert run.parameters["version"] == 0


def test_a_stack_that_comes_up_leaves_toggles_and_limits_as_a_person_set_them(deployed: SyncPrefectClient) -> None:
    def nightly() -> DeploymentSchedule:
        (schedule,) = deployed.read_deployment_by_name("post-training/post-training").schedules
        return schedule

    def monthly() -> list[DeploymentSchedule]:
        return deployed.read_deployment_by_name("maintain-chain/maintain-chain").schedules

    found = deployed.read_deployment_by_name("post-training/post-training")
    queue = deployed.read_work_queue_by_name("evaluation", work_pool_name=WORK_POOL)
    maintained = deployed.read_deployment_by_name("maintain-chain/maintain-chain")
    monthly_at_three = CronSchedule(cron="0 3 1 * *")
    deployed.create_deployment_schedules(maintained.id, [DeploymentScheduleCreate(schedule=monthly_at_three)])
    deployed.update_deployment_schedule(found.id, nightly().id, active=True)
    deployed.update_work_queue(queue.id, concurrency_limit=3)
    try:
        deploy_all(keeps_toggles=True)
        assert nightly().active
        assert [schedule.active for schedule in monthly()] == [True]
        assert deployed.read_work_queue(queue.id).concurrency_limit == 3
        deploy_all()
        assert not nightly().active
        assert deployed.read_work_queue(queue.id).concurrency_limit == 3
    finally:
        deployed.update_work_queue(queue.id, concurrency_limit=1)
        for schedule in monthly():
            deployed.delete_deployment_schedule(maintained.id, schedule.id)


def test_what_an_earlier_stack_left_behind_is_cancelled_and_plans_are_kept(deployed: SyncPrefectClient) -> None:
    found = deployed.read_deployment_by_name("reconcile/reconcile")
    left_behind = deployed.create_flow_run_from_deployment(found.id, parameters={"chains": ["memory://past"]})
    planned = deployed.create_flow_run_from_deployment(
        found.id,
        parameters={"chains": ["memory://future"]},
        state=Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=3)),
    )
    assert end_stale_runs(deployed) >= 1
    kept = deployed.read_flow_run(planned.id).state
    assert kept is not None
    assert kept.is_scheduled()
    deployed.delete_flow_run(planned.id)
    state = deployed.read_flow_run(left_behind.id).state
    assert state is not None
    assert state.is_cancelled()
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    assert deployed.read_flow_runs(flow_run_filter=running) == []
