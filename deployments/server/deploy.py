"""Creates the work pool, queues, automations and the deployments of prefect.yaml on a Prefect server."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.states import Cancelled

from weightline.deployments.server.automations import ensure_automation, zombie_automation
from weightline.deployments.worker import WORK_POOL, WORK_QUEUES
from weightline.deployments.worker.warm_worker import WarmWorker
from weightline.errors import LaunchError

PREFECT_FILE = Path(__file__).parents[1] / "prefect.yaml"


def deploy_all(*, keeps_toggles: bool = False) -> None:
    """Creates pool, queues and automations, and deploys every flow. Safe to repeat.

    Whether a schedule is active is taken from the file, or with `keeps_toggles` from the server. Raises LaunchError
    with Prefect's message if Prefect refuses the deployments.
    """
    with get_client(sync_client=True) as client:
        create_queues(client)
        ensure_automation(client, zombie_automation())
        toggles = _read_toggles(client) if keeps_toggles else {}
        _prefect_deploy()
        for deployment in client.read_deployments():
            for schedule in deployment.schedules:
                is_active = toggles.get((deployment.id, schedule.slug), schedule.active)
                if schedule.active != is_active:
                    client.update_deployment_schedule(deployment.id, schedule.id, active=is_active)


def _read_toggles(client: SyncPrefectClient) -> dict[tuple[UUID, str | None], bool]:
    """Reads whether each schedule of each deployment is active. Deploying recreates schedules and keeps their slugs."""
    found = client.read_deployments()
    return {(one.id, schedule.slug): schedule.active for one in found for schedule in one.schedules}


def _prefect_deploy() -> None:
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr).splitlines()[-20:]
        message = "\n    ".join(["Prefect refused the deployments:", *tail])
        raise LaunchError(message, argv=argv, returncode=done.returncode, tail=tail)


def create_queues(client: SyncPrefectClient) -> None:
    """Creates the pool and its queues. A queue without a limit gets a limit of one run. Safe to repeat."""
    try:
        template = WarmWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type=WarmWorker.type, base_job_template=template))
    except ObjectAlreadyExists:
        pass
    for queue in WORK_QUEUES:
        try:
            found = client.read_work_queue_by_name(queue, work_pool_name=WORK_POOL)
        except ObjectNotFound:
            found = client.create_work_queue(queue, work_pool_name=WORK_POOL)
        if found.concurrency_limit is None:
            client.update_work_queue(found.id, concurrency_limit=1)


def end_stale_runs(client: SyncPrefectClient) -> int:
    """Ends runs that an earlier stack on the same database left behind, so that they do not start now.

    Deletes overdue runs that a schedule created, and cancels others. Runs that are scheduled for later stay. Call it
    only for a server that this stack alone uses and that has just started. Returns the number of runs. Safe to repeat.
    """
    under_way = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]
    stale = (
        FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=under_way))),
        FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(before_=datetime.now(UTC)),
        ),
    )
    return sum(_end_all(client, one) for one in stale)


def _end_all(client: SyncPrefectClient, stale: FlowRunFilter) -> int:
    num_ended = 0
    while found := client.read_flow_runs(flow_run_filter=stale, limit=100):
        for run in found:
            if run.auto_scheduled and run.state is not None and run.state.is_scheduled():
                client.delete_flow_run(run.id)
            else:
                client.set_flow_run_state(run.id, Cancelled(message="The stack of this run was ended"), force=True)
        num_ended += len(found)
    return num_ended
