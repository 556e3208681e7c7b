"""Two machines, each with a launcher and ranks of its own, train one stage together and commit one chain."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.runs.recipes import write_recipe
from tests.waiting import PATIENCE_SECONDS, wait_until
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import RecipeError
from weightline.launch.command import launch_environment
from weightline.launch.machines import (
    MAIN_ADDRESS_VARIABLE,
    MAIN_PORT_VARIABLE,
    Call,
    calling,
    launching,
    new_call,
    standing_calls,
)
from weightline.launch.peer import answer
from weightline.launch.ranks import run_ranks
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.stages.job import StageResult
from weightline.stages.model import materialize_model


def _call(job_path: Path, **changes: object) -> Call:
    return new_call(job_path, 4, "cpu", 2, {"A": "b"}).model_copy(update=changes)


def test_a_call_stands_while_the_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MAIN_ADDRESS_VARIABLE, "10.0.0.7")
    monkeypatch.setenv(MAIN_PORT_VARIABLE, "1234")
    call = _call(tmp_path / "job.json")
    assert standing_calls(tmp_path) == []
    with calling(tmp_path, call):
        assert standing_calls(tmp_path) == [call]
    assert standing_calls(tmp_path) == []
    argv = call.argv(1)
    options = {name: argv[argv.index(name) + 1] for name in ("--machine_rank", "--num_machines", "--num_processes")}
    assert options == {"--machine_rank": "1", "--num_machines": "2", "--num_processes": "4"}
    assert argv[argv.index("--main_process_ip") + 1] == "10.0.0.7"
    assert argv[argv.index("--main_process_port") + 1] == "1234"


def test_a_call_replaces_what_a_crash_left(tmp_path: Path) -> None:
    left, other = _call(tmp_path / "job.json"), _call(tmp_path / "other.json")
    with calling(tmp_path, left), calling(tmp_path, other):
        again = _call(tmp_path / "job.json")
        with calling(tmp_path, again):
            assert {call.call_id for call in standing_calls(tmp_path)} == {again.call_id, other.call_id}


def test_a_call_that_cannot_be_answered_is_told_and_the_machine_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(_call(tmp_path / "gone" / "job.json"), tmp_path, 1)
    assert "gone/job.json is not a stage job" in capsys.readouterr().err


def test_ranks_spread_evenly_over_the_machines(tmp_path: Path) -> None:
    run = prepare_run(write_recipe(tmp_path, num_machines=2, num_processes=4), tmp_path / "runs", "even")
    assert run.placement.num_processes == 4
    with pytest.raises(RecipeError, match="do not spread evenly over 2 machines"):
        prepare_run(write_recipe(tmp_path, num_machines=2, num_processes=3), tmp_path / "runs", "odd")


def _prepared(folder: Path) -> Run:
    stages = [{"kind": "sft", "max_steps": 4, "learning_rate": 1e-3, "sync_steps": 2, "dataset": {"num_examples": 64}}]
    run = prepare_run(write_recipe(folder, num_machines=2, num_processes=2, stages=stages), folder / "runs", "two")
    materialize_model(run.recipe.model, run.start_model_dir, seed=0)
    return run


@pytest.mark.train
def test_two_machines_train_one_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two loopback addresses: the second one reaches the first at 127.0.0.2."""
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(MAIN_ADDRESS_VARIABLE, "127.0.0.2")
    monkeypatch.setenv(MAIN_PORT_VARIABLE, str(port))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run = _prepared(tmp_path)
    job = run.job("sft")
    job.output_dir.mkdir(parents=True)
    job.save(job.output_dir / "job.json")
    peer = subprocess.Popen(
        [sys.executable, "-m", "weightline.launch.peer", str(run.folder.parent), "--machine-rank", "1"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        env = launch_environment(job, os.environ)
        with launching(
            job.output_dir / "job.json", run.folder.parent,
            num_processes=run.placement.num_processes, device="cpu", num_machines=2, environment={},
        ) as argv:  # fmt: skip
            run_ranks(argv, env, job.output_dir / "ranks.log", lambda _: None, lambda: None)
        # The second machine's launcher may end a moment after the first one's.
        wait_until((job.output_dir / "ranks-1.log").exists)
    finally:
        peer.send_signal(signal.SIGTERM)
        _, told = peer.communicate(timeout=PATIENCE_SECONDS)
    result = StageResult.load(job)
    assert result is not None, told
    assert result.global_step == 4
    chain = run.open_chain()
    assert [(m.global_step, m.world_size) for m in chain.manifests()] == [(0, 2), (2, 2), (4, 2)]
    assert {payload.rank for payload in chain.tip().payloads} == {0, 1}
    assert verify_chain(chain).holds
