"""A training that is cancelled, then killed with kill -9, and retried each time through Prefect, loses no bit."""

from __future__ import annotations

import subprocess
import sys
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
from tests.stages.rewards import HOLDS
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain.upkeep.verify import verify_chain
from weightline.deployments.worker import WORKER_TYPE
from weightline.flows.post_training import post_training
from weightline.runs.folder import Run, open_run
from weightline.runs.prepare import prepare_run
from weightline.stages.job import StageJob, StageResult
from weightline.tasks.training import make_start_model

pytestmark = [
    pytest.mark.train, pytest.mark.nightly, pytest.mark.timeout(900), pytest.mark.usefixtures("server_environment"),
]  # fmt: skip

POOL, QUEUE = "retry-pool", "retry"
_STAGES = [
    {"kind": "sft", "max_steps": 2, "learning_rate": 1e-3, "sync_steps": 2, "dataset": {"num_examples": 200}},
    {
        "kind": "grpo", "max_steps": 6, "learning_rate": 1e-3, "sync_steps": 1, "save_steps": 2,
        "dataset": {"num_examples": 200}, "per_device_batch_size": 8,
        "reward": "tests.stages.rewards:held_share_of_even_bytes",
        "trainer_args": {"num_generations": 4, "max_completion_length": 4},
    },
]  # fmt: skip


def _first_stage_is_done(recipe: Path, runs_dir: Path) -> Run:
    """A run whose first stage has finished. No launcher is started for it."""
    run = prepare_run(str(recipe), str(runs_dir), "held", None)
    make_start_model.fn(run)
    job = run.job("sft")
    job.output_dir.mkdir(parents=True)
    run_stage(job, job.output_dir / "ranks.log", num_ranks=run.placement.num_processes)
    return run


def _start(client: SyncPrefectClient, recipe: Path, run: Run) -> UUID:
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
    parameters = {"recipe": str(recipe), "runs_dir": str(run.folder.parent), "run_id": run.run_id}
    return client.create_flow_run_from_deployment(deployment_id, parameters=parameters).id


def _retry(flow_run_id: UUID) -> None:
    argv = [sys.executable, "-m", "prefect", "flow-run", "retry", str(flow_run_id)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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


def _assert_gone(ranks: list[psutil.Process], num_ranks: int) -> None:
    assert len(ranks) >= num_ranks
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE_SECONDS)
    assert [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def _undisturbed(run: Run, folder: Path) -> StageJob:
    """The stage grpo of the same run, from the same model, in one go and without Prefect."""
    job = run.job("grpo").model_copy(update={"output_dir": folder / "grpo", "chain_url": (folder / "chain").as_uri()})
    folder.mkdir()
    run_stage(job, folder / "ranks.log", num_ranks=run.placement.num_processes)
    return job


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_training_survives_cancel_and_kill(
    num_ranks: int, client: SyncPrefectClient, workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it is held in the middle of a step, past a checkpoint.

    By day, tests/trainer kills one of two ranks of every kind of stage, and tests/deployments cancels runs.
    """
    runs_dir, holds = tmp_path / "runs", tmp_path / "holds"
    holds.mkdir()
    monkeypatch.setenv(HOLDS, str(holds))
    workers.start(POOL, QUEUE, PYTHONPATH=str(ROOT))

    def wait(is_reached: Callable[[], bool]) -> None:
        wait_until(is_reached, told=workers.output)

    def ranks_at(step: int) -> list[psutil.Process]:
        wait((holds / f"at-{step}").exists)
        return _processes("weightline.stages.rank")

    recipe = write_recipe(tmp_path, stages=_STAGES, num_processes=num_ranks)
    folder = _first_stage_is_done(recipe, runs_dir).folder
    sft_done = (folder / "stages" / "sft" / "done.json").stat().st_mtime_ns
    (holds / "hold-3").touch()
    flow_run_id = _start(client, recipe, open_run(folder))

    def state() -> State:
        found = client.read_flow_run(flow_run_id).state
        assert found is not None
        return found

    ranks = ranks_at(3)
    client.set_flow_run_state(flow_run_id, Cancelling())
    wait(lambda: state().is_cancelled())
    _assert_gone(ranks, num_ranks)
    assert verify_chain(open_run(folder).open_chain()).holds

    (holds / "hold-3").rename(holds / "hold-5")
    _retry(flow_run_id)
    ranks = ranks_at(5)
    # Launcher and flow at once: no process is left that could end the ranks.
    flow_process = psutil.Process(int(client.read_flow_run(flow_run_id).infrastructure_pid or 0))
    for process in (*_processes("accelerate.commands.launch"), flow_process):
        process.kill()
    _assert_gone(ranks, num_ranks)
    wait(lambda: state().is_final())
    assert state().is_crashed()
    assert verify_chain(open_run(folder).open_chain()).holds

    (holds / "hold-5").unlink()
    _retry(flow_run_id)
    wait(lambda: state().is_final() and not state().is_crashed())
    assert state().is_completed(), state().message
    run = open_run(folder)
    assert [path.parent for path in runs_dir.glob("*/run.json")] == [folder]  # a retry resumes: no second run
    assert (folder / "stages" / "sft" / "done.json").stat().st_mtime_ns == sft_done  # the finished stage was skipped
    result = StageResult.load(run.job("grpo"))
    assert result is not None
    assert result.resumed_from_step == 4
    assert verify_chain(run.open_chain()).holds
    reference = _undisturbed(run, tmp_path / "undisturbed")
    weights = "model.safetensors"
    trained = (run.job("grpo").final_model_dir / weights).read_bytes()
    assert trained == (reference.final_model_dir / weights).read_bytes()
