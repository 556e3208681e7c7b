"""The three rank programs as a person's recipe starts them: real TRL, real ZeRO-3, two ranks, one after the other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import ROOT
from tests.ranks import run_stage
from weightline.launch.command import launch_argv, launch_environment
from weightline.stages.job import StageJob, StageResult
from weightline.stages.load import parse_recipe
from weightline.stages.model import materialize_model
from weightline.stages.recipe import Recipe

pytestmark = pytest.mark.train

_QUICK = {
    "max_steps": 4, "save_steps": 2, "learning_rate": 3e-4, "per_device_batch_size": 8,
    "dataset": {"num_examples": 100},
}  # fmt: skip
_RECIPE = {
    "name": "small",
    "seed": 3,
    "device": "cpu",
    "model": {"tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}},
    "arithmetic": {"num_heldout": 20},
    "stages": [
        {"kind": "sft", **_QUICK, "trainer_args": {"report_to": ["tensorboard"]}},
        {"kind": "dpo", **_QUICK},
        {
            "kind": "grpo",
            **_QUICK,
            "reward": "tests.stages.rewards:share_of_even_bytes",
            "trainer_args": {"num_generations": 4, "max_completion_length": 4},
        },
    ],
}


def launch(job: StageJob) -> None:
    """Run a stage as flows start it: accelerate's launcher, and ranks that are processes of their own."""
    job_path = job.output_dir / "job.json"
    job.save(job_path)
    argv, env = launch_argv(job_path, num_processes=2), launch_environment(job, os.environ)
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def fork(job: StageJob) -> None:
    """Run a stage in ranks that need no launcher."""
    job.output_dir.mkdir(parents=True, exist_ok=True)
    run_stage(job, job.output_dir / "ranks.log")


def result_of(job: StageJob) -> StageResult:
    result = StageResult.load(job)
    assert result is not None
    return result


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[StageJob]:
    """All three stages, run: the first by the launcher."""
    recipe: Recipe = parse_recipe(_RECIPE)
    folder = tmp_path_factory.mktemp("run")
    model_dir = materialize_model(recipe.model, folder / "model", recipe.seed)
    jobs = []
    for stage in recipe.stages:
        jobs.append(
            StageJob(
                stage=stage,
                arithmetic=recipe.arithmetic,
                model_dir=model_dir,
                output_dir=folder / stage.kind,
                run_id="run-1",
                seed=recipe.seed,
            )
        )
        run = launch if stage is recipe.stages[0] else fork
        run(jobs[-1])
        result = result_of(jobs[-1])
        assert (result.kind, result.global_step, result.resumed_from_step) == (stage.kind, 4, 0)
        model_dir = jobs[-1].final_model_dir
    return jobs


def weights(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    return {name: tensor.view(torch.int16).numpy().tobytes() for name, tensor in tensors.items()}


def test_each_stage_starts_from_the_one_before_and_moves_the_weights(jobs: list[StageJob]) -> None:
    for job in jobs:
        before, after = weights(job.model_dir), weights(job.final_model_dir)
        assert before.keys() == after.keys()
        assert before != after
        AutoModelForCausalLM.from_pretrained(job.final_model_dir)
        assert (job.final_model_dir / "tokenizer.json").is_file()


def test_forked_ranks_train_the_same_bits_as_launched_ones(jobs: list[StageJob], tmp_path: Path) -> None:
    """Other tests start ranks without a launcher (tests/ranks.py): it makes no difference to what they train."""
    launched = jobs[0]
    forked = launched.model_copy(update={"output_dir": tmp_path / "forked"})
    fork(forked)
    assert weights(forked.final_model_dir) == weights(launched.final_model_dir)


def test_every_step_is_logged_with_what_the_stage_is_about(jobs: list[StageJob]) -> None:
    for job, number in zip(jobs, ("mean_token_accuracy", "rewards/margins", "reward"), strict=True):
        lines = [json.loads(line) for line in job.metrics_path.read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert [line["step"] for line in steps] == [1, 2, 3, 4]
        assert all(number in line for line in steps)


def test_a_reporter_of_the_recipe_hears_of_every_step(jobs: list[StageJob]) -> None:
    heard = {job.stage.kind: list(job.output_dir.rglob("events.out.tfevents.*")) for job in jobs}
    assert {kind: len(files) > 0 for kind, files in heard.items()} == {"sft": True, "dpo": False, "grpo": False}
    told = b"".join(file.read_bytes() for file in heard["sft"])
    assert told.count(b"train/loss") >= 4


def test_checkpoints_are_whole_and_the_marker_comes_last(jobs: list[StageJob]) -> None:
    for job in jobs:
        for step in (2, 4):
            names = {path.name for path in (job.output_dir / f"checkpoint-{step}").glob("rank-*.whole")}
            assert names == {"rank-0-of-2.whole", "rank-1-of-2.whole"}
        assert job.done_path.stat().st_mtime_ns >= (job.final_model_dir / "model.safetensors").stat().st_mtime_ns


def test_grpo_resumes_exactly_between_two_generated_batches(jobs: list[StageJob]) -> None:
    """What a crash after the first checkpoint leaves; sft and dpo meet a real kill -9 in tests/trainer."""
    job = jobs[-1]
    expected, lines = weights(job.final_model_dir), job.metrics_path.read_text().splitlines()
    shutil.rmtree(job.output_dir / "checkpoint-4")
    shutil.rmtree(job.final_model_dir)
    job.done_path.unlink()
    fork(job)
    assert result_of(job).resumed_from_step == 2
    assert weights(job.final_model_dir) == expected
    again = job.metrics_path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in again] == [json.loads(line)["step"] for line in lines]


def test_a_finished_stage_is_left_alone(jobs: list[StageJob]) -> None:
    job = jobs[0]
    before = job.done_path.stat().st_mtime_ns
    fork(job)
    assert job.done_path.stat().st_mtime_ns == before
