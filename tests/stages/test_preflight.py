"""The checks of a recipe against the machine: before anything is trained or written."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.chains import commit_state, random_state
from tests.stages.test_recipe import changed, rolling, stage
from weightline.chain import open_chain
from weightline.errors import RecipeError
from weightline.stages.load import parse_recipe
from weightline.stages.preflight import Placement, check_recipe, is_local_path, plan_placement
from weightline.stages.trainer_args import OWNED_ARGS, REPORTERS, trainer_field_names


def refused(raw: dict[str, Any]) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        check_recipe(parse_recipe(raw), num_cuda_devices=0)
    assert caught.value.facts["remedy"]
    return caught.value


def test_a_sound_recipe_says_where_it_runs() -> None:
    assert check_recipe(parse_recipe(changed()), num_cuda_devices=0) == Placement("cpu", 2)


def test_a_missing_model_folder(tmp_path: Path) -> None:
    error = refused(changed(model={"path": str(tmp_path / "none")}))
    assert error.facts["field"] == "model.path"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_model_folder_without_a_part(tmp_path: Path, missing: str) -> None:
    for name in {"config.json", "model.safetensors", "tokenizer.json"} - {missing}:
        (tmp_path / name).write_text("{}")
    error = refused(changed(model={"path": str(tmp_path)}))
    assert error.facts["field"] == "model.path"
    assert "has no" in str(error)


@pytest.mark.parametrize("content", ["", "\n\n", "[1, 2", json.dumps({"question": "1+1="})])
def test_a_dataset_that_cannot_be_used(tmp_path: Path, content: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    error = refused(changed(stages=stage(dataset={"path": str(path)})))
    assert error.facts["field"] == "stages[0].dataset.path"


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    error = refused(changed(stages=stage(dataset={"path": str(tmp_path / "none.jsonl")})))
    assert error.facts["field"] == "stages[0].dataset.path"


def test_an_empty_dataset_folder(tmp_path: Path) -> None:
    error = refused(changed(stages=stage(dataset={"path": str(tmp_path)})))
    assert "is empty" in str(error)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("sft", {"prompt": "1+1=", "completion": "2"}),
        ("sft", {"text": "1+1=2"}),
        ("dpo", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
        ("grpo", {"prompt": "1+1=", "answer": "2"}),
    ],
)
def test_a_local_dataset_in_the_trainers_format(tmp_path: Path, kind: str, example: dict[str, str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(example) + "\n")
    reward = {"reward": "rewards:exact"} if kind == "grpo" else {}
    check_recipe(parse_recipe(changed(stages=stage(kind=kind, dataset={"path": str(path)}, **reward))), 0)


@pytest.mark.parametrize(
    ("kind", "name", "remedy"),
    [
        ("sft", "beta", "remove it"),
        ("dpo", "max_lenght", "did you mean `max_length`?"),
        ("grpo", "num_generation", "did you mean `num_generations`?"),
        ("sft", "max_steps", "stages[].max_steps"),
        ("sft", "use_cpu", "device"),
    ],
)
def test_a_trainer_argument_that_does_not_exist_or_belongs_to_the_stage(kind: str, name: str, remedy: str) -> None:
    error = refused(changed(stages=stage(kind=kind, per_device_batch_size=8, trainer_args={name: 1})))
    assert error.facts["field"] == f"stages[0].trainer_args.{name}"
    assert remedy in str(error.facts["remedy"])


def test_the_names_read_from_the_source_are_trls_own() -> None:
    assert {"beta", "learning_rate", "gradient_checkpointing", "max_length"} <= trainer_field_names("dpo")
    assert "num_generations" in trainer_field_names("grpo") - trainer_field_names("dpo")
    assert OWNED_ARGS.keys() <= trainer_field_names("sft")


def test_groups_of_generations_fill_the_batch() -> None:
    grpo = stage(kind="grpo", per_device_batch_size=3, trainer_args={"num_generations": 4})
    assert refused(changed(stages=grpo)).facts["field"] == "stages[0].per_device_batch_size"


def test_rollouts_that_the_stage_can_keep() -> None:
    for rollouts in ({}, {"lookahead": 0, "staleness": 0}, {"lookahead": 2, "staleness": 2}, {"replicas": "local"}):
        assert check_recipe(parse_recipe(changed(stages=rolling(**rollouts))), num_cuda_devices=0)


@pytest.mark.parametrize(
    ("rollouts", "fields", "trainer_args", "field", "remedy"),
    [
        ({"lookahead": 0, "staleness": 0}, {"sync_steps": 2}, {}, "rollouts.staleness", "`sync_steps: 1`"),
        ({"staleness": 0}, {}, {}, "rollouts.staleness", "at least 1, better 2, or `lookahead: 0`"),
        ({}, {}, {"steps_per_generation": 2, "num_iterations": 2}, "rollouts.staleness", "at least 4"),
        ({"lookahead": 3}, {}, {"gradient_accumulation_steps": 2}, "rollouts.staleness", "at least 3"),
        ({}, {}, {"generation_batch_size": 64}, "rollouts.staleness", "at least 4"),
        ({}, {"per_device_batch_size": 4}, {}, "per_device_batch_size", "a multiple of 8"),
        ({}, {}, {"use_vllm": True}, "trainer_args.use_vllm", "leave it out"),
        ({}, {}, {"vllm_importance_sampling_correction": False},
         "trainer_args.vllm_importance_sampling_correction", "need the correction"),
        ({}, {}, {"generation_kwargs": {"no_repeat_ngram_size": 2}}, "trainer_args.generation_kwargs", "temperature"),
    ],
)  # fmt: skip
def test_rollouts_that_the_stage_cannot_keep(
    rollouts: dict[str, Any], fields: dict[str, Any], trainer_args: dict[str, Any], field: str, remedy: str
) -> None:
    grpo = [rolling(**rollouts)[0] | fields | {"trainer_args": trainer_args}]
    error = refused(changed(stages=grpo))
    assert error.facts["field"] == f"stages[0].{field}"
    assert remedy in str(error.facts["remedy"])


def test_versions_that_take_several_steps_age_samples_less() -> None:
    trainer_args = {"steps_per_generation": 2, "num_iterations": 2}
    slower = [rolling()[0] | {"sync_steps": 2, "trainer_args": trainer_args}]
    assert check_recipe(parse_recipe(changed(stages=slower)), num_cuda_devices=0)


def test_a_local_replica_is_for_one_machine() -> None:
    error = refused(changed(stages=rolling(replicas="local"), num_machines=2, num_processes=2))
    assert error.facts["field"] == "stages[0].rollouts.replicas"


def test_a_folder_of_evaluation_tasks_that_is_not_there() -> None:
    error = refused(changed(evaluation={"include_path": "/no/such/folder"}))
    assert error.facts["field"] == "evaluation.include_path"


@pytest.mark.parametrize(
    ("fields", "num_cuda_devices", "placement"),
    [
        ({}, 0, Placement("cpu", 2)),
        ({}, 1, Placement("cuda", 1)),
        ({}, 4, Placement("cuda", 4)),
        ({"num_processes": 2}, 1, Placement("cpu", 2)),
        ({"num_processes": 2}, 4, Placement("cuda", 2)),
        ({"device": "cpu"}, 4, Placement("cpu", 2)),
        ({"num_processes": 4}, 0, Placement("cpu", 4)),
    ],
)
def test_placement(fields: dict[str, Any], num_cuda_devices: int, placement: Placement) -> None:
    assert plan_placement(parse_recipe(changed(**fields)), num_cuda_devices, num_cores=2) == placement


@pytest.mark.parametrize(
    ("fields", "num_cuda_devices"),
    [({"num_processes": 5}, 0), ({"device": "cuda"}, 0), ({"device": "cuda", "num_processes": 3}, 2)],
)
def test_more_ranks_than_the_machine_can_start(fields: dict[str, Any], num_cuda_devices: int) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_placement(parse_recipe(changed(**fields)), num_cuda_devices, num_cores=2)
    assert caught.value.facts["field"] == "num_processes"


def test_what_counts_as_local(tmp_path: Path) -> None:
    assert not is_local_path("Qwen/Qwen3-0.6B")
    assert not is_local_path("gpt2")
    assert is_local_path(str(tmp_path))
    assert is_local_path("./model")
    assert is_local_path("~/model")
    assert is_local_path("runs/a/model")


@pytest.mark.parametrize(
    ("report_to", "problem", "remedy"),
    [
        (["swanlab"], "swanlab needs the package swanlab", "pip install swanlab"),
        ("codecarbon", "codecarbon needs the package codecarbon", "pip install codecarbon"),
        ("kubeflow", "its own trainer", "KUBEFLOW_TRAINER_SERVER_URL"),
        ("tensorbord", "no reporter 'tensorbord'", "did you mean `tensorboard`?"),
        ([3], "does not name a reporter", "trackio"),
    ],
)
def test_a_reporter_that_would_fail_in_a_rank(report_to: Any, problem: str, remedy: str) -> None:
    error = refused(changed(stages=stage(trainer_args={"report_to": report_to})))
    assert error.facts["field"] == "stages[0].trainer_args.report_to"
    assert problem in str(error)
    assert remedy in str(error.facts["remedy"])


def test_reporters_that_are_there_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://trainer")
    for report_to in ("none", [], ["none"], "kubeflow", ["tensorboard"]):
        assert check_recipe(parse_recipe(changed(stages=stage(trainer_args={"report_to": report_to}))), 0)


def test_reporters_are_those_of_transformers() -> None:
    """From its source: importing it takes seconds."""
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "integrations" / "integration_utils.py").read_text()
    table = source.partition("INTEGRATION_TO_CALLBACK = {")[2].partition("}")[0]
    assert set(REPORTERS) == set(re.findall(r'"(\w+)":', table))


def test_a_version_to_start_from(tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "chain").as_uri())
    commit_state(chain, random_state(0))
    assert check_recipe(parse_recipe(changed(model={"chain": chain.url, "version": 0})), num_cuda_devices=0)
    error = refused(changed(model={"chain": chain.url, "version": "7"}))
    assert error.facts["field"] == "model.chain"
    assert "has no version 7" in str(error)
    assert "model.chain" in str(refused(changed(model={"chain": "nowhere://x"})))
