"""Real TRL stages on two DeepSpeed ZeRO-3 ranks: the callback changes no bit, and a killed rank costs none."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import run_stage, start_stage
from tests.trainer import killed_ranks
from tests.trainer.killed_ranks import KILLED_AT_STEP
from weightline.chain import open_chain
from weightline.chain.replay.state import read_state
from weightline.codec.torch_ops import bits_of
from weightline.stages.job import StageJob, StageResult
from weightline.stages.model import materialize_model
from weightline.stages.recipe import DatasetConfig, ModelConfig, StageConfig, StageKind, TinyModelConfig

pytestmark = pytest.mark.train

_MAX_STEPS, _SAVE_STEPS = 10, 4


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = TinyModelConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    return materialize_model(ModelConfig(tiny=tiny), tmp_path_factory.mktemp("model"), seed=0)


@dataclass
class Stage:
    """One stage of one run, in a folder of its own."""

    kind: StageKind
    model_dir: Path
    folder: Path
    publish: bool = True

    @property
    def job(self) -> StageJob:
        stage = StageConfig(
            kind=self.kind, max_steps=_MAX_STEPS, learning_rate=3e-4, per_device_batch_size=4, sync_steps=3,
            save_steps=_SAVE_STEPS, dataset=DatasetConfig(num_examples=200),
        )  # fmt: skip
        chain_url = f"file://{self.folder}/bucket/chain" if self.publish else None
        return StageJob(
            stage=stage,
            model_dir=self.model_dir,
            output_dir=self.folder / self.kind,
            run_id="run-1",
            chain_url=chain_url,
        )

    def run(self) -> StageResult:
        run_stage(self.job, self.folder / "ranks.log")
        result = StageResult.load(self.job)
        assert result is not None
        return result

    def losses(self) -> list[str]:
        """The loss of every step, to the last digit."""
        lines = self.job.metrics_path.read_text().splitlines()
        return [repr(json.loads(line)["loss"]) for line in lines if "loss" in json.loads(line)]

    def weights(self) -> dict[str, bytes]:
        """What trainer.save_model wrote."""
        tensors = load_file(self.job.final_model_dir / "model.safetensors")
        return {name: bits_of(tensor.reshape(-1)).tobytes() for name, tensor in tensors.items()}

    def tip(self) -> dict[str, bytes]:
        assert self.job.chain_url is not None
        chain = open_chain(self.job.chain_url)
        return {name: bits.tobytes() for name, bits in read_state(chain, chain.tip().version).bits.items()}


@pytest.fixture(scope="module", params=["sft", "dpo"])
def undisturbed(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    stage = Stage(request.param, model_dir, tmp_path_factory.mktemp(f"{request.param}-undisturbed"))
    stage.run()
    return stage


def test_the_callback_changes_no_digit_of_the_loss(undisturbed: Stage, tmp_path: Path) -> None:
    plain = Stage(undisturbed.kind, undisturbed.model_dir, tmp_path, publish=False)
    plain.run()
    assert len(plain.losses()) == _MAX_STEPS
    assert plain.losses() == undisturbed.losses()
    assert plain.weights() == undisturbed.weights()


def test_the_tip_is_what_save_model_wrote(undisturbed: Stage) -> None:
    assert undisturbed.tip() == undisturbed.weights()
    assert undisturbed.job.chain_url is not None
    manifests = open_chain(undisturbed.job.chain_url).manifests()
    # Every third step, every checkpoint, and the end.
    assert [m.global_step for m in manifests] == [0, 3, 4, 6, 8, 9, 10]
    assert [m.is_milestone for m in manifests] == [True] + [False] * 5 + [True]
    assert all(m.world_size == 2 for m in manifests)


def test_a_killed_rank_costs_no_bit(undisturbed: Stage, tmp_path: Path) -> None:
    stage = Stage(undisturbed.kind, undisturbed.model_dir, tmp_path)
    ranks = start_stage(stage.job, stage.folder / "ranks.log", killed_ranks.main)
    assert ranks.wait()[1] == -signal.SIGKILL, ranks.log_tail
    assert len(stage.losses()) in (KILLED_AT_STEP - 1, KILLED_AT_STEP)
    assert stage.job.chain_url is not None
    chain = open_chain(stage.job.chain_url)
    before = chain.tip().version
    read_state(chain, before)
    assert StageResult.load(stage.job) is None
    result = stage.run()
    assert result.resumed_from_step == _SAVE_STEPS
    assert stage.weights() == undisturbed.weights()
    assert stage.tip() == undisturbed.weights()
    after = open_chain(stage.job.chain_url).manifests(first=before + 1)
    # What was committed past the checkpoint is history, not lost: a revert leads back, and training goes on from there.
    if open_chain(stage.job.chain_url).manifest(before).global_step > result.resumed_from_step:
        assert after[0].kind == "revert"
        assert after[0].reverts_to is not None
        assert chain.manifest(after[0].reverts_to).global_step == result.resumed_from_step
    assert torch.tensor([m.num_changed for m in after]).sum() > 0
