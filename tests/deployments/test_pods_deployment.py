"""infra/kubernetes/prefect.yaml deployed for real, as the worker's pod does it: training belongs to the pods' pool."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate

from tests import ROOT
from weightline.deployments.server.deploy import deploy_all


@pytest.mark.nightly
def test_training_moves_to_the_pool_of_pods_with_its_schedule(
    client: SyncPrefectClient, server_environment: None
) -> None:
    deploy_all()
    before = client.read_deployment_by_name("post-training/post-training")
    template = json.loads((ROOT / "infra/kubernetes/work-pool.json").read_text())
    client.create_work_pool(WorkPoolCreate(name="machines", type="kubernetes", base_job_template=template))
    argv = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    argv += ["--prefect-file", "infra/kubernetes/prefect.yaml"]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    after = client.read_deployment_by_name("post-training/post-training")
    try:
        assert (before.id, before.work_pool_name) == (after.id, "weightline")
        assert (after.work_pool_name, after.work_queue_name) == ("machines", "default")
        assert after.job_variables == {"machines": 2, "gpus": 8}
        (nightly,) = after.schedules
        assert not nightly.active
    finally:
        deploy_all()
        client.delete_work_pool("machines")
