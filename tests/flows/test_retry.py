"""A training that is cancelled, then killed with kill -9, and retried each time through Prefect, loses no bit."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectAlreadyExists
from prefect.states import Cancelling

from tests import ROOT
from tests.prefect_server import Workers
from tests.ranks import run_stage
from tests.runs.recipes import write_recipe
from tests.waiting import wait_until
from weightline.chain.upkeep.verify import verify_chain
from weightline.deployments.worker import WORKER_TYPE
from weightline.flows.post_training import post_training
from weightline.runs.folder import Run, open_run
from weightline.stages.job import StageJob, StageResult

pytestmark = [pytest.mark.train, pytest.mark.timeout(900), pytest.mark.usefixtures("server_environment")]

POOL, QUEUE = "retry-pool", "retry"
_STAGES = [
    {"kind": "sft", "max_steps": 4, "learning_rate": 1e-3, "sync_steps": 4, "dataset": {"num_examples": 200}},
    {
        "kind": "dpo", "max_steps": 50, "learning_rate": 1e-3, "sync_steps": 10, "save_steps": 10,
        "dataset": {"num_examples": 200}, "per_device_batch_size": 2,
    },
]  # fmt: skip


def _start(client: SyncPrefectClient, recipe: Path, runs_dir: Path) -> UUID:
    try:
        client.create_work_pool(WorkPoolCreate(name=POOL, type=WORKER_TYPE))
        client.create_work_queue(QUEUE, work_pool_name=POOL)
    except ObjectAlreadyExists:
        pass
    deployment_id = client.create_deployment(
        flow_id=client.create_flow_from_name(post_training.name), name="retried",
        entrypoint="weightline.flows.post_training.post_training", work_pool_name=POOL, work_queue_name=QUEUE,
        parameter_openapi_schema={},
    )  # fmt: skip
    parameters = {"recipe": str(recipe), "runs_dir": str(runs_dir)}
    return client.create_flow_run_from_deployment(deployment_id, parameters=parameters).id


def _retry(flow_run_id: UUID) -> None:
    argv = [sys.executable, "-m", "prefect", "flow-run", "retry", str(flow_run_id)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def _step_of(runs_dir: Path, kind: str) -> int:
    """The newest step that the stage of the only run has logged."""
    lines = [line for path in runs_dir.glob(f"*/stages/{kind}/metrics.jsonl") for line in path.read_text().splitlines()]
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _processes(program: str) -> list[psutil.Process]:
    """Those of our descendants that run a program."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if program in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def _assert_gone_within(seconds: float, ranks: list[psutil.Process]) -> None:
    assert len(ranks) >= 2
    _, alive = psutil.wait_procs(ranks, timeout=seconds)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def _undisturbed(run: Run, folder: Path) -> StageJob:
    """The stage dpo of the same run, from the same model, in one go and without Prefect."""
    job = run.job("dpo").model_copy(update={"output_dir": folder / "dpo", "chain_url": (folder / "chain").as_uri()})
    folder.mkdir()
    run_stage(job, folder / "ranks.log")
    return job


def test_a_training_survives_cancel_and_kill(client: SyncPrefectClient, workers: Workers, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    workers.start(POOL, QUEUE)

    def wait(is_reached: Callable[[], bool]) -> None:
        wait_until(is_reached, told=workers.output)

    flow_run_id = _start(client, write_recipe(tmp_path, stages=_STAGES), runs_dir)

    def state() -> State:
        found = client.read_flow_run(flow_run_id).state
        assert found is not None
        return found

    wait(lambda: _step_of(runs_dir, "dpo") >= 12)
    (folder,) = (path.parent for path in runs_dir.glob("*/run.json"))
    ranks = _processes("weightline.stages.rank")
    client.set_flow_run_state(flow_run_id, Cancelling())
    cancelled_at = time.monotonic()
    wait(lambda: state().is_cancelled())
    _assert_gone_within(max(0.1, 60.0 - (time.monotonic() - cancelled_at)), ranks)
    assert verify_chain(open_run(folder).open_chain()).holds

    sft_done = (folder / "stages" / "sft" / "done.json").stat().st_mtime_ns
    _retry(flow_run_id)
    wait(lambda: _step_of(runs_dir, "dpo") >= 22)
    ranks = _processes("weightline.stages.rank")
    # Launcher and flow at once: no process is left that could end the ranks.
    flow_process = psutil.Process(int(client.read_flow_run(flow_run_id).infrastructure_pid or 0))
    for process in (*_processes("accelerate.commands.launch"), flow_process):
        process.kill()
    _assert_gone_within(10.0, ranks)
    wait(lambda: state().is_final())
    assert state().is_crashed()
    assert verify_chain(open_run(folder).open_chain()).holds

    _retry(flow_run_id)
    wait(lambda: state().is_final() and not state().is_crashed())
    assert state().is_completed(), state().message
    run = open_run(folder)
    assert [path.parent for path in runs_dir.glob("*/run.json")] == [folder]  # a retry resumes: no second run
    assert (folder / "stages" / "sft" / "done.json").stat().st_mtime_ns == sft_done  # the finished stage was skipped
    result = StageResult.load(run.job("dpo"))
    assert result is not None
    assert result.resumed_from_step >= 20
    assert verify_chain(run.open_chain()).holds
    reference = _undisturbed(run, tmp_path / "undisturbed")
    weights = "model.safetensors"
    assert (run.job("dpo").final_model_dir / weights).read_bytes() == (reference.final_model_dir / weights).read_bytes()
