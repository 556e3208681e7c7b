"""When a stage is finished, that its bits are the chain's, and how its failure reaches the person."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from safetensors.torch import load_file, save_file

from tests.chains import commit_state, nudged, random_state
from tests.runs.recipes import write_recipe
from weightline.chain import Chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.deployments.server.automations import WATCHED_TAG
from weightline.errors import DigestMismatchError, InputError, LaunchError
from weightline.flows.post_training import post_training, train_stage
from weightline.format import keys
from weightline.runs import stage as stages
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.runs.progress import MetricsFollower
from weightline.runs.stage import (
    StageProof,
    differing_tensors,
    finished_version,
    last_version,
    prove_stage,
    read_proof,
)
from weightline.stages.job import StageResult


def _trained(run: Run) -> Chain:
    """What two ranks of stage sft would leave: two versions, the last one a milestone, and its weights in model/."""
    chain = run.open_chain()
    state = random_state(0)
    commit_state(chain, state, is_milestone=True)
    commit_state(chain, nudged(state, 1), state, is_milestone=True)
    write_checkpoint(chain, 1, run.job("sft").final_model_dir)
    return chain


def _mark_done(run: Run, global_step: int) -> None:
    result = StageResult(
        kind="sft", run_id=run.run_id, global_step=global_step, resumed_from_step=0, train_seconds=1.0, metrics={}
    )
    run.job("sft").done_path.write_text(result.model_dump_json())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run called run-1, as the versions of tests.chains say."""
    return prepare_run(write_recipe(tmp_path), tmp_path / "runs", "run-1")


def test_a_stage_is_finished_when_marker_and_chain_agree(run: Run) -> None:
    job = run.job("sft")
    assert finished_version(job, run.open_chain()) is None
    chain = _trained(run)
    assert finished_version(job, chain) is None  # no marker
    _mark_done(run, global_step=7)
    assert finished_version(job, chain) is None  # the marker vouches for another step
    _mark_done(run, global_step=1)
    finished = finished_version(job, chain)
    assert finished is not None
    assert finished.version == 1


def test_versions_of_other_stages_and_runs_do_not_count(run: Run) -> None:
    manifests = list(_trained(run).newest_first())
    assert [manifest.version for manifest in manifests] == [1, 0]
    assert last_version(manifests, "sft", "run-1") == manifests[0]
    assert last_version(manifests, "dpo", "run-1") is None
    assert last_version(manifests, "sft", "run-2") is None
    assert last_version((), "sft", "run-1") is None


def test_what_is_near_the_tip_is_found_without_reading_history(run: Run) -> None:
    chain = _trained(run)
    chain.store.delete(keys.commit(0))
    chain.store.put(keys.commit(0), b"nobody reads this")
    _mark_done(run, global_step=1)
    finished = finished_version(run.job("sft"), run.open_chain())
    assert finished is not None
    assert finished.version == 1


def test_equal_bits_are_proved_and_written_down(run: Run) -> None:
    _trained(run)
    proof = prove_stage(run, run.job("sft"))
    assert (proof.version, proof.is_bit_equal) == (1, True)
    assert StageProof.model_validate_json(run.equality_path("sft").read_bytes()) == proof
    assert read_proof(run, "sft") == proof
    assert read_proof(run, "dpo") is None


def test_one_wrong_bit_is_found_and_named(run: Run) -> None:
    _trained(run)
    path = run.job("sft").final_model_dir / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestMismatchError) as caught:
        prove_stage(run, run.job("sft"))
    assert caught.value.facts["what"] in random_state(0)
    assert not run.equality_path("sft").exists()


def test_a_missing_and_an_additional_tensor_are_found(run: Run, tmp_path: Path) -> None:
    chain = _trained(run)
    tensors = load_file(run.job("sft").final_model_dir / "model.safetensors")
    name = next(iter(random_state(0)))
    tensors["added"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    assert differing_tensors(chain, 1, tmp_path) == sorted([name, "added"])


def test_a_stage_without_versions_proves_nothing(run: Run) -> None:
    with pytest.raises(InputError, match="no version of stage sft"):
        prove_stage(run, run.job("sft"))


def test_a_finished_stage_is_skipped_and_proved_again(server: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    _trained(run)
    _mark_done(run, global_step=1)
    monkeypatch.setattr(stages, "run_ranks", _must_not_run)
    assert train_stage(str(run.folder), "sft").version == 1


def test_a_failing_rank_fails_the_run_with_its_own_last_lines(
    client: SyncPrefectClient, tmp_path: Path, server_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    run = prepare_run(recipe, tmp_path / "runs", "failing-1")
    run.start_model_dir.mkdir()
    (run.start_model_dir / ".complete").touch()

    def launch(*_: Any) -> list[str]:
        fake = [sys.executable, "-m", "tests.launch.fake_launcher", "rank-fails", str(tmp_path / "pids")]
        return [*fake, "accelerate.commands.launch"]

    monkeypatch.setattr("weightline.launch.machines.launch_argv", launch)
    with pytest.raises(LaunchError, match="ValueError: the data are gone"):
        post_training(recipe=str(recipe), run_id="failing-1", runs_dir=str(tmp_path / "runs"))

    whole, stage = ("failing-1", "sft of failing-1")
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[whole, stage])))
    told = {flow_run.name: flow_run for flow_run in found}
    for flow_run in (told[whole], told[stage]):
        assert flow_run.state is not None
        assert flow_run.state.is_failed()
        assert "rank 1 ended with exit code 3" in (flow_run.state.message or "")
    assert WATCHED_TAG in told[stage].tags
    assert "the data are gone" in (run.stage_dir("sft") / "ranks.log").read_text()


def test_metrics_are_followed_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFollower(path)
    metrics.refresh()
    assert (metrics.step, metrics.numbers) == (0, {})
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    metrics.refresh()
    assert metrics.numbers == {"step": 1, "loss": 2.5}
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    metrics.refresh()
    assert metrics.numbers == {"step": 2, "loss": 2.25}
    path.write_text('{"step": 1, "loss": 9}\n')  # a resumed stage drops what came after its checkpoint
    metrics.refresh()
    assert metrics.numbers == {"step": 1, "loss": 9}


def _must_not_run(*_: Any) -> None:
    raise AssertionError("a finished stage was started")
