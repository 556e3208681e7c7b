"""A schedule of deployments/prefect.yaml fires, and a worker executes what it made."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule

from tests.prefect_server import Workers
from tests.waiting import wait_until
from weightline.deployments.server.deploy import deploy_all
from weightline.deployments.worker import WORK_POOL


def _scheduled_runs(client: SyncPrefectClient) -> list[FlowRun]:
    named = DeploymentFilter(name=DeploymentFilterName(any_=["reconcile"]))
    return [run for run in client.read_flow_runs(deployment_filter=named) if run.auto_scheduled]


def test_what_a_schedule_makes_is_run(
    client: SyncPrefectClient, server_environment: None, workers: Workers, tmp_path: Path
) -> None:
    deploy_all()
    found = client.read_deployment_by_name("reconcile/reconcile")
    (often,) = client.create_deployment_schedules(found.id, [(IntervalSchedule(interval=timedelta(seconds=5)), True)])
    began_at = time.time()
    workers.start(
        WORK_POOL, "upkeep", WEIGHTLINE_RUNS_DIR=str(tmp_path), WEIGHTLINE_CHAINS=(tmp_path / "chain").as_uri()
    )
    try:
        wait_until(
            lambda: any(run.state and run.state.is_completed() for run in _scheduled_runs(client)),
            told=workers.output,
        )  # fmt: skip
    finally:
        client.delete_deployment_schedule(found.id, often.id)
    done = next(run for run in _scheduled_runs(client) if run.state and run.state.is_completed())
    assert done.start_time is not None
    assert done.start_time.timestamp() >= began_at - 1
    assert done.work_queue_name == "upkeep"
