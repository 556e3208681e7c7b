"""A stage with `rollouts: {replicas: local}`: its replica starts with it, is kept alive, and ends with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs.recipes import write_recipe
from tests.waiting import wait_until
from weightline.chain.read.records import SAMPLES, read_records
from weightline.errors import LaunchError
from weightline.launch.replica import kept_replica
from weightline.rollouts.record import parse_samples
from weightline.runs.prepare import prepare_run
from weightline.runs.stage import prove_stage, run_stage
from weightline.serving.http.client import read_address
from weightline.stages.model import materialize_model


def _replicas(state_dir: Path) -> list[psutil.Process]:
    """The servers with this state folder that run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            argv = process.cmdline()
            if "weightline.launch.tether" not in argv and str(state_dir) in argv:
                found.append(process)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "replica"
    for process in _replicas(tmp_path / "replica"):
        process.kill()


@pytest.mark.train
def test_a_stage_trains_on_samples_of_its_own_replica(tmp_path: Path) -> None:
    grpo = {
        "kind": "grpo", "max_steps": 3, "learning_rate": 1e-3, "per_device_batch_size": 8, "sync_steps": 1,
        "reward": "tests.stages.rewards:share_of_even_bytes", "dataset": {"num_examples": 50},
        "rollouts": {"replicas": "local", "staleness": 1, "deadline_seconds": 200},
        "trainer_args": {"num_generations": 4, "max_completion_length": 4},
    }  # fmt: skip
    run = prepare_run(write_recipe(tmp_path, stages=[grpo]), tmp_path / "runs", "run-1")
    materialize_model(run.recipe.model, run.start_model_dir, run.recipe.seed, run.recipe.dtype)
    job = run.job("grpo")
    seen: set[int] = set()
    run_stage(run, job, {}, print, lambda: seen.update(one.pid for one in _replicas(job.replica_dir)))
    assert len(seen) == 1
    assert _replicas(job.replica_dir) == []
    assert prove_stage(run, job).version == 3
    found = [parse_samples(record) for record in read_records(run.open_chain(), SAMPLES)]
    assert [(one.global_step, one.num_samples, set(one.replicas)) for one in found] == [
        (step, 16, {"grpo-rollouts"}) for step in (1, 2, 3)
    ]  # fmt: skip


@pytest.mark.process
def test_a_replica_that_ends_is_started_again_at_its_address(tmp_path: Path, state_dir: Path) -> None:
    with kept_replica((tmp_path / "chain").as_uri(), state_dir, os.getpid()) as look:
        wait_until(lambda: read_address(state_dir) is not None)
        look()
        url = read_address(state_dir)
        (server,) = _replicas(state_dir)
        server.kill()

        def is_replaced() -> bool:
            look()
            return [one for one in _replicas(state_dir) if one != server] != []

        wait_until(is_replaced)
        wait_until(lambda: read_address(state_dir) == url)
    assert _replicas(state_dir) == []


@pytest.mark.process
def test_a_replica_that_cannot_live_ends_the_stage_with_its_last_words(tmp_path: Path, state_dir: Path) -> None:
    def keep_looking() -> bool:
        look()
        return False

    with (
        kept_replica((tmp_path / "chain").as_uri(), state_dir, os.getpid(), "--lease", "-1") as look,
        pytest.raises(LaunchError, match="the inference server ended with exit code") as caught,
    ):
        wait_until(keep_looking)
    assert caught.value.facts["tail"]


@pytest.mark.process
def test_a_replica_ends_when_its_run_is_killed(tmp_path: Path, state_dir: Path) -> None:
    program = (
        "import os, sys, time; from pathlib import Path; from weightline.launch.replica import kept_replica\n"
        "with kept_replica(sys.argv[1], Path(sys.argv[2]), os.getpid()): time.sleep(1000)"
    )
    argv = [sys.executable, "-c", program, (tmp_path / "chain").as_uri(), str(state_dir)]
    with subprocess.Popen(argv) as run:
        try:
            wait_until(lambda: read_address(state_dir) is not None)
            assert len([one for one in _replicas(state_dir) if one.pid != run.pid]) == 1
        finally:
            run.kill()
    wait_until(lambda: _replicas(state_dir) == [])
