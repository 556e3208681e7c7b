"""A GRPO stage in float32 on samples of a replica, and how exact its logprobs must be.

    python -m tests.stages.exact_rollouts FOLDER NUM_STEPS

trains it on two ranks, at staleness 0, on the replicas that follow the chain FOLDER/bucket/chain, and checks it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.ranks import run_stage
from weightline.stages.job import StageJob
from weightline.stages.model import materialize_model
from weightline.stages.recipe import DatasetConfig, ModelConfig, RolloutsConfig, StageConfig, TinyModelConfig

NUM_GENERATIONS = 4


def make_model(folder: Path) -> Path:
    """Random weights of a model that vLLM serves on a CPU, too."""
    tiny = TinyModelConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=32, max_position_embeddings=256
    )
    return materialize_model(ModelConfig(tiny=tiny), folder, 0, "float32")


def rollout_job(model_dir: Path, folder: Path, max_steps: int, **rollouts: Any) -> StageJob:
    (folder / "notes").mkdir(parents=True, exist_ok=True)
    stage = StageConfig(
        kind="grpo", max_steps=max_steps, learning_rate=3e-4, per_device_batch_size=8, sync_steps=1, save_steps=4,
        dataset=DatasetConfig(num_examples=100), reward="tests.stages.rewards:noted_share_of_even_bytes",
        rollouts=RolloutsConfig(deadline_seconds=300, **rollouts),
        trainer_args={
            "num_generations": NUM_GENERATIONS, "max_completion_length": 8, "lr_scheduler_type": "constant",
        },
    )  # fmt: skip
    return StageJob(
        stage=stage, model_dir=model_dir, dtype="float32", output_dir=folder / "grpo", run_id="run-1",
        chain_url=f"file://{folder}/bucket/chain",
    )  # fmt: skip


def logged_steps(job: StageJob) -> list[dict[str, float]]:
    """What was logged of each step."""
    lines = [json.loads(line) for line in job.metrics_path.read_text().splitlines()]
    return [line for line in lines if "reward" in line]


def assert_on_policy(job: StageJob, num_steps: int) -> None:
    """The replica's logprobs are the trainer's own, at every step."""
    steps = logged_steps(job)
    assert [line["step"] for line in steps] == list(range(1, num_steps + 1))
    for line in steps:
        assert line["rollout/staleness_max"] == 0
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        for part in ("min", "mean", "max"):
            assert abs(line[f"sampling/importance_sampling_ratio/{part}"] - 1) < 1e-3


def main() -> None:
    folder, num_steps = Path(sys.argv[1]), int(sys.argv[2])
    job = rollout_job(make_model(folder / "model"), folder, num_steps, lookahead=0, staleness=0)
    run_stage(job, folder / "ranks.log")
    assert_on_policy(job, num_steps)
    print(max(line["sampling/sampling_logp_difference/max"] for line in logged_steps(job)))


if __name__ == "__main__":
    main()
