"""A run is checked before anything is written, and found again by its id."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.chains import commit_state, nudged, random_state
from tests.runs.recipes import write_recipe
from weightline.chain import open_chain
from weightline.chain.read.records import read_records
from weightline.errors import InputError, NotFoundError, RecipeError, StorageError
from weightline.runs.folder import CHAINS_VARIABLE, configured_chains, new_run_id, open_run
from weightline.runs.prepare import prepare_run
from weightline.runs.recipes import RUNS, evaluation_task, recorded_recipe
from weightline.stages.recipe import ModelConfig, parse_start


def test_a_new_run_writes_its_folder_its_bucket_and_its_record(tmp_path: Path) -> None:
    run = prepare_run(write_recipe(tmp_path), tmp_path / "runs", "toy-1")
    assert run.folder == tmp_path / "runs" / "toy-1"
    assert run.chain_url == (run.folder / "bucket" / "toy-1").as_uri()
    assert (run.placement.device, run.placement.num_processes) == ("cpu", 2)
    (record,) = read_records(run.open_chain(), RUNS)
    assert record["name"] == "toy-1"
    assert record["recipe"] == run.recipe.model_dump(mode="json")
    assert open_run(run.folder) == run
    assert prepare_run(None, tmp_path / "runs", "toy-1") == run


def test_stages_start_from_the_stage_before(tmp_path: Path) -> None:
    run = prepare_run(write_recipe(tmp_path), tmp_path / "runs", "toy-1")
    first, second = run.job("sft"), run.job("dpo")
    assert first.model_dir == run.start_model_dir
    assert second.model_dir == first.final_model_dir
    assert {first.chain_url, second.chain_url} == {run.chain_url}
    assert {first.run_id, second.run_id} == {"toy-1"}
    with pytest.raises(InputError, match="no stage 'grpo'"):
        run.job("grpo")


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    prepare_run(recipe, tmp_path / "runs", "toy-1")
    assert prepare_run(recipe, tmp_path / "runs", "toy-1").run_id == "toy-1"
    with pytest.raises(InputError, match="another recipe"):
        prepare_run(write_recipe(tmp_path, seed=5), tmp_path / "runs", "toy-1")


def test_resuming_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no run nowhere"):
        prepare_run(None, tmp_path / "runs", "nowhere")
    assert not (tmp_path / "runs").exists()


def test_a_wrong_recipe_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="learning_rates"):
        prepare_run(write_recipe(tmp_path, learning_rates=3), tmp_path / "runs")
    with pytest.raises(RecipeError, match="num_processes"):
        prepare_run(write_recipe(tmp_path, num_processes=4096), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_bucket_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(StorageError):
        prepare_run(write_recipe(tmp_path), tmp_path / "runs", "toy-1", locked.as_uri())


def test_a_bucket_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StorageError, InputError)):
        prepare_run(write_recipe(tmp_path), tmp_path / "runs", "toy-1", (tmp_path / "file" / "chain").as_uri())


def test_a_run_id_cannot_leave_the_runs_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="object key"):
        prepare_run(write_recipe(tmp_path), tmp_path / "runs", "../outside")


def test_a_folder_of_something_else_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the folder of a run"):
        open_run(tmp_path)


def test_run_ids_sort_by_time() -> None:
    assert new_run_id("toy", datetime(2026, 11, 24, 6, 50, 12, tzinfo=UTC)) == "toy-20261124-065012"


def test_a_version_is_evaluated_as_its_runs_recipe_says(tmp_path: Path) -> None:
    evaluation = {"limit": 33, "batch_size": 16}
    run = prepare_run(write_recipe(tmp_path, evaluation=evaluation), tmp_path / "runs", "run-1")
    chain = run.open_chain()
    commit_state(chain, random_state(0))  # by run-1
    recipe = recorded_recipe(chain, 0)
    assert recipe == run.recipe
    task = evaluation_task(recipe, None, None, tmp_path / "work")
    assert (task.name, task.limit, task.batch_size) == ("arithmetic", 33, 16)
    assert task.problems is not None
    assert len(task.problems.read_text().splitlines()) == run.recipe.arithmetic.num_heldout
    assert evaluation_task(recipe, None, 5, tmp_path / "work").limit == 5


def test_a_version_of_a_run_without_a_recipe_needs_a_task() -> None:
    with pytest.raises(InputError, match="name a task"):
        evaluation_task(None, None, None, Path("unused"))
    assert evaluation_task(None, "gsm8k", 10, Path("unused")).name == "gsm8k"


def test_some_stages_of_a_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    run = prepare_run(recipe, tmp_path / "runs", "toy-1", kinds=["dpo"])
    assert [stage.kind for stage in run.recipe.stages] == ["dpo"]
    assert run.job("dpo").model_dir == run.start_model_dir
    assert prepare_run(recipe, tmp_path / "runs", "toy-1", kinds=["dpo"]) == run
    with pytest.raises(InputError, match="another recipe"):
        prepare_run(recipe, tmp_path / "runs", "toy-1")
    with pytest.raises(RecipeError, match="stages: the recipe toy has no stage 'grpo'") as caught:
        prepare_run(recipe, tmp_path / "runs", "toy-2", kinds=["grpo"])
    assert caught.value.facts["field"] == "stages"


def test_a_run_from_a_version_stays_with_that_version(tmp_path: Path) -> None:
    chain = open_chain((tmp_path / "chain").as_uri())
    state = random_state(0)
    commit_state(chain, state)
    recipe = write_recipe(tmp_path)
    run = prepare_run(recipe, tmp_path / "runs", "toy-1", start_from=f"{chain.url}@tip")
    assert (run.recipe.model.chain, run.recipe.model.version, run.recipe.model.tiny) == (chain.url, "0", None)
    commit_state(chain, nudged(state, 1), state)
    assert prepare_run(recipe, tmp_path / "runs", "toy-1", start_from=f"{chain.url}@tip") == run
    assert prepare_run(None, tmp_path / "runs", "toy-1") == run
    with pytest.raises(RecipeError, match=r"model\.chain"):
        prepare_run(recipe, tmp_path / "runs", "toy-2", start_from=f"{chain.url}@9")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("Qwen/Qwen3-0.6B", {"path": "Qwen/Qwen3-0.6B"}),
        ("/models/mine", {"path": "/models/mine"}),
        ("file:///b/chain@12", {"chain": "file:///b/chain", "version": "12"}),
        ("s3://bucket/chain", {"chain": "s3://bucket/chain"}),
        ("hf://buckets/me@org/chain", {"chain": "hf://buckets/me@org/chain"}),
        ("s3://bucket/chain@best", {"chain": "s3://bucket/chain", "version": "best"}),
    ],
)
def test_what_a_person_names_to_start_from(text: str, start: dict[str, str]) -> None:
    assert parse_start(text) == ModelConfig.model_validate(start)


def test_all_configured_chains_are_looked_after_newest_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert configured_chains(tmp_path) == []
    (tmp_path / "no-run").mkdir()
    (tmp_path / "no-run" / "run.json").write_text("{}")
    older, newer = (prepare_run(write_recipe(tmp_path), tmp_path, name) for name in ("older", "newer"))
    os.utime(older.folder / "run.json", (1, 1))
    assert configured_chains(tmp_path) == [newer.chain_url, older.chain_url]
    plain_path = older.chain_url.removeprefix("file://")
    monkeypatch.setenv(CHAINS_VARIABLE, f"ftp://no-bucket {plain_path}")
    assert configured_chains(tmp_path) == ["ftp://no-bucket", older.chain_url, newer.chain_url]
