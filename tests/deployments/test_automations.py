"""A training that no longer says that it lives is marked as crashed, by the server alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from tests import ROOT
from tests.waiting import wait_until
from weightline.deployments.server.automations import WATCHED_TAG, ZOMBIES, ensure_automation, zombie_automation

_PROGRAM = (
    "from prefect import flow, tags\n"
    "import sys, time\n"
    "@flow(flow_run_name='doomed part')\n"
    "def part():\n"
    "    print('begun', flush=True)\n"
    "    time.sleep(300)\n"
    "@flow(flow_run_name='doomed')\n"
    "def doomed():\n"
    "    part()\n"
    "with tags(sys.argv[1]):\n"
    "    doomed()\n"
)


def test_trainings_bear_the_tag_that_is_watched() -> None:
    deployments = yaml.safe_load((ROOT / "deployments/prefect.yaml").read_text())["deployments"]
    assert [d["name"] for d in deployments if WATCHED_TAG in d["tags"]] == ["post-training"]


def test_a_training_whose_process_and_worker_are_gone_is_marked_with_its_stages(
    client: SyncPrefectClient, server_environment: None, tmp_path: Path
) -> None:
    before = client.read_automations_by_name(ZOMBIES)
    for _ in range(2):
        ensure_automation(client, zombie_automation(timedelta(seconds=10)))
    (made,) = client.read_automations_by_name(ZOMBIES)
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, WATCHED_TAG], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(3)  # its first sign of life is on its way
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    named = FlowRunFilter(name=FlowRunFilterName(any_=["doomed", "doomed part"]))
    states = wait_until(
        lambda: [run.state for run in client.read_flow_runs(flow_run_filter=named)],
        lambda found: len(found) == 2 and all(state and state.is_crashed() for state in found),
    )
    assert ["heartbeats stopped" in ((state and state.message) or "") for state in states] == [True, True]
    if before:
        ensure_automation(client, zombie_automation())
    else:
        client.delete_automation(made.id)
