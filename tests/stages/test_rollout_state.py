"""GRPO that is killed in the middle of a generated batch: the resumed training gives the bits of an undisturbed one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranks import run_stage, start_stage
from tests.trainer import killed_ranks
from weightline.codec.torch_ops import bits_of
from weightline.stages.job import StageJob, StageResult
from weightline.stages.model import materialize_model
from weightline.stages.recipe import DatasetConfig, ModelConfig, StageConfig, TinyModelConfig

pytestmark = pytest.mark.train

#: A generated batch serves four optimizer steps. The rank is killed after step 7, in the second batch.
_BATCH = {"steps_per_generation": 2, "num_iterations": 2}
_SAVE_STEPS = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    return materialize_model(ModelConfig(tiny=tiny), tmp_path_factory.mktemp("model"), seed=0)


def _job(model_dir: Path, folder: Path) -> StageJob:
    stage = StageConfig(
        kind="grpo", max_steps=9, learning_rate=3e-4, per_device_batch_size=4, sync_steps=2, save_steps=_SAVE_STEPS,
        dataset=DatasetConfig(num_examples=100), reward="tests.stages.rewards:share_of_even_bytes",
        trainer_args={"num_generations": 4, "max_completion_length": 4, **_BATCH},
    )  # fmt: skip
    return StageJob(
        stage=stage, model_dir=model_dir, output_dir=folder / "grpo", run_id="run-1",
        chain_url=f"file://{folder}/bucket/chain",
    )  # fmt: skip


def _weights(job: StageJob) -> dict[str, bytes]:
    saved = load_file(job.final_model_dir / "model.safetensors")
    return {name: bits_of(tensor.reshape(-1)).tobytes() for name, tensor in saved.items()}


def _logged(job: StageJob, name: str) -> dict[int, str]:
    """What was logged under a name, to the last digit, by step."""
    lines = [json.loads(line) for line in job.metrics_path.read_text().splitlines()]
    return {line["step"]: repr(line[name]) for line in lines if name in line}


def test_a_rank_killed_in_the_middle_of_a_generated_batch_costs_no_bit(model_dir: Path, tmp_path: Path) -> None:
    undisturbed, killed = _job(model_dir, tmp_path / "undisturbed"), _job(model_dir, tmp_path / "killed")
    run_stage(undisturbed, tmp_path / "undisturbed.log")
    ranks = start_stage(killed, tmp_path / "killed.log", killed_ranks.main)
    assert ranks.wait()[1] == -signal.SIGKILL, ranks.log_tail
    run_stage(killed, tmp_path / "killed.log")
    result = StageResult.load(killed)
    assert result is not None
    assert result.resumed_from_step == 2 * _SAVE_STEPS
    assert _weights(killed) == _weights(undisturbed)
    assert sorted(_logged(undisturbed, "reward")) == [1, 5, 9]
    for name in ("reward", "loss"):
        assert _logged(killed, name) == _logged(undisturbed, name)
