"""Jobs, results, launch commands and the choice of a checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from weightline.errors import InputError
from weightline.launch.command import accelerate_config, launch_argv, launch_environment
from weightline.stages.checkpoints import ResumePlan, mark_whole, plan_resume
from weightline.stages.job import StageJob, StageResult
from weightline.stages.recipe import DatasetConfig, StageConfig


def job_in(folder: Path, **fields: object) -> StageJob:
    stage = StageConfig(kind="sft", max_steps=4, learning_rate=1e-3, trainer_args={"warmup_steps": 2})
    known = {"stage": stage, "model_dir": folder / "base", "output_dir": folder / "out", "run_id": "run-1"}
    return StageJob.model_validate(known | fields)


def checkpoint(job: StageJob, step: int, ranks: tuple[int, ...], world_size: int = 2) -> Path:
    folder = job.output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for rank in ranks:
        mark_whole(folder, rank, world_size)
    return folder


def test_a_job_survives_its_file(tmp_path: Path) -> None:
    job = job_in(tmp_path, chain_url="memory://b/c", seed=5, resume=False)
    job.save(tmp_path / "job.json")
    assert StageJob.load(tmp_path / "job.json") == job


@pytest.mark.parametrize("text", [None, "{}", "{", '{"unknown": 1}'])
def test_a_file_that_is_no_job(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "job.json").write_text(text)
    with pytest.raises(InputError, match=r"job\.json is not a stage job"):
        StageJob.load(tmp_path / "job.json")


def test_a_stage_without_a_marker_is_not_done(tmp_path: Path) -> None:
    assert StageResult.load(job_in(tmp_path)) is None


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert plan_resume(job_in(tmp_path), world_size=2) == ResumePlan(None, 0, ())


def test_the_newest_whole_checkpoint_is_taken_and_torn_ones_go(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    checkpoint(job, 50, (0, 1))
    newest = checkpoint(job, 100, (0, 1))
    torn = [checkpoint(job, 150, (0,)), checkpoint(job, 1000, ())]
    assert plan_resume(job, world_size=2) == ResumePlan(newest, 100, tuple(torn))


def test_starting_afresh_removes_everything(tmp_path: Path) -> None:
    job = job_in(tmp_path, resume=False)
    folder = checkpoint(job, 50, (0, 1))
    job.done_path.write_text("{}")
    assert plan_resume(job, world_size=2) == ResumePlan(None, 0, (folder, job.done_path))


def test_a_checkpoint_of_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    checkpoint(job, 50, (0, 1, 2), world_size=3)
    with pytest.raises(InputError, match="written by 3 ranks and 2 are running"):
        plan_resume(job, world_size=2)


def test_the_command_line(tmp_path: Path) -> None:
    argv = launch_argv(tmp_path / "job.json", num_processes=3)
    assert argv[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert argv[-4:] == ["-m", "weightline.stages.rank", "--job", str(tmp_path / "job.json")]
    assert argv[argv.index("--num_processes") + 1] == "3"
    assert argv[argv.index("--config_file") + 1].endswith("zero3_cpu.yaml")
    assert "zero3_gpu.yaml" in " ".join(launch_argv("job.json", 1, "cuda"))


def test_every_configuration_of_accelerate_is_found_and_is_zero_3() -> None:
    deepspeed = json.loads(accelerate_config("ds_zero3.json").read_text())
    assert deepspeed["zero_optimization"]["stage"] == 3
    assert deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "optimizer" not in deepspeed  # torch AdamW: nothing to compile
    with pytest.raises(InputError, match=r"no zero9\.yaml"):
        accelerate_config("zero9.yaml")


def test_the_environment(tmp_path: Path) -> None:
    env = launch_environment(job_in(tmp_path), {"PATH": "/bin", "OMP_NUM_THREADS": "3"})
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["DS_ACCELERATOR"] == "cpu"
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["PATH"] == "/bin"


def test_a_dataset_from_the_hub_may_use_the_network(tmp_path: Path) -> None:
    stage = StageConfig(kind="sft", max_steps=1, learning_rate=1e-3, dataset=DatasetConfig(path="trl-lib/tldr"))
    env = launch_environment(job_in(tmp_path, stage=stage, device="cuda"), {})
    assert "HF_HUB_OFFLINE" not in env
    assert "DS_ACCELERATOR" not in env
