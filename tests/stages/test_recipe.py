"""Recipes: what is accepted, and that every mistake is one error with the field and the remedy."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from weightline.errors import ErrorKind, RecipeError
from weightline.stages.load import load_recipe, parse_recipe, shipped_recipes

RECIPES = Path(__file__).parents[2] / "deployments" / "recipes"
SMALL: dict[str, Any] = {
    "name": "small",
    "model": {"tiny": {}},
    "stages": [{"kind": "sft", "max_steps": 2, "learning_rate": 1e-3}],
}


def changed(**fields: Any) -> dict[str, Any]:
    return deepcopy(SMALL) | fields


def stage(**fields: Any) -> list[dict[str, Any]]:
    return [SMALL["stages"][0] | fields]


def rolling(**rollouts: Any) -> list[dict[str, Any]]:
    """A GRPO stage with these rollouts."""
    return stage(kind="grpo", sync_steps=1, rollouts=rollouts)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem


def test_the_repository_has_recipes() -> None:
    assert (RECIPES / "arithmetic.yaml").is_file()


def test_stages_inherit_sync_steps_unless_they_say_their_own() -> None:
    stages = [*stage(), *stage(kind="dpo", sync_steps=3)]
    recipe = parse_recipe(changed(sync_steps=7, stages=stages))
    assert [each.sync_steps for each in recipe.stages] == [7, 3]


def test_a_recipe_does_not_change() -> None:
    recipe = parse_recipe(SMALL)
    with pytest.raises(ValidationError):
        recipe.seed = 1  # type: ignore[misc]


def test_a_recipe_survives_its_json() -> None:
    for stages in (stage(), rolling(), rolling(replicas=["http://10.0.0.1:8000"], staleness=3)):
        recipe = parse_recipe(changed(sync_steps=7, stages=stages))
        assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe


def test_rollouts_are_left_out_by_a_word_as_well() -> None:
    assert parse_recipe(changed(stages=stage(kind="grpo", rollouts="none"))).stages[0].rollouts is None


@pytest.mark.parametrize(
    ("raw", "field", "remedy"),
    [
        (changed(naem="x"), "naem", "did you mean `name`?"),
        (changed(stages=stage(max_step=3)), "stages[0].max_step", "did you mean `max_steps`?"),
        (changed(model={"tiny": {"hidden": 64}}), "model.tiny.hidden", "did you mean `hidden_size`?"),
        (changed(stages=stage(dataset={"zzz": 1})), "stages[0].dataset.zzz", "known fields: path, name, split"),
        ({key: SMALL[key] for key in ("name", "stages")}, "model", "add this field"),
        (changed(stages=[]), "stages", "correct the value"),
        (changed(stages=stage(kind="ppo")), "stages[0].kind", "correct the value ('ppo')"),
        (changed(stages=stage(learning_rate=0)), "stages[0].learning_rate", "correct the value (0)"),
        (changed(num_processes=0), "num_processes", "correct the value (0)"),
        (changed(name="Not A Name"), "name", "correct the value"),
        (changed(model={}), "model", "correct the value"),
        (changed(model={"path": "a/b", "tiny": {}}), "model", "correct the value"),
        (changed(stages=stage(reward="m:f")), "stages[0]", "correct the value"),
        (changed(stages=stage(kind="grpo", dataset={"path": "a/b"})), "stages[0]", "correct the value"),
        (changed(stages=[*stage(), *stage()]), "recipe", "correct the value"),
        (changed(stages=stage(rollouts={})), "stages[0]", "correct the value"),
        (changed(stages=rolling(lookahed=2)), "stages[0].rollouts.lookahed", "did you mean `lookahead`?"),
        (changed(stages=rolling(staleness=-1)), "stages[0].rollouts.staleness", "correct the value (-1)"),
        (changed(stages=rolling(mixing="maybe")), "stages[0].rollouts.mixing", "correct the value ('maybe')"),
        (changed(stages=rolling(deadline_seconds=0)), "stages[0].rollouts.deadline_seconds", "correct the value (0)"),
        (changed(stages=rolling(rollout="module.function")), "stages[0].rollouts.rollout", "'module.function'"),
        (changed(stages=rolling(replicas="all")), "stages[0].rollouts.replicas", "correct the value ('all')"),
        (changed(stages=rolling(replicas=[])), "stages[0].rollouts.replicas", "correct the value"),
        (changed(stages=rolling(replicas=["localhost:80"])), "stages[0].rollouts.replicas", "localhost:80"),
    ],
)
def test_a_mistake_names_its_field_and_the_remedy(raw: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw)
    assert caught.value.facts["field"] == field
    assert remedy in str(caught.value.facts["remedy"])
    assert str(caught.value).startswith(f"{field}: ")
    assert caught.value.kind is ErrorKind.RECIPE


def test_further_mistakes_are_counted() -> None:
    with pytest.raises(RecipeError, match="1 more to correct"):
        parse_recipe(changed(naem="x", sed=1))


@pytest.mark.parametrize("text", ["a: [1,", "just words", "", "\ufffe"])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-16" if text == "\ufffe" else "utf-8"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.facts["field"] == "recipe"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read.*shipped recipe \(arithmetic\)"):
        load_recipe(tmp_path / "none.yaml")


def test_a_shipped_recipe_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(shipped_recipes()) == [path.stem for path in sorted(RECIPES.glob("*.yaml"))]
    for path in RECIPES.glob("*.yaml"):
        assert load_recipe(path.stem) == load_recipe(path)


def test_a_file_comes_before_the_shipped_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("arithmetic").write_bytes((RECIPES / "arithmetic.yaml").read_bytes() + b"num_processes: 3\n")
    assert load_recipe("arithmetic").num_processes == 3


@pytest.mark.process
def test_reading_and_checking_a_recipe_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "import weightline.stages.preflight as p, weightline.stages.load as l\n"
        "import weightline.launch.command, weightline.stages.job, weightline.stages.arithmetic\n"
        f"p.check_recipe(l.load_recipe({str(RECIPES / 'arithmetic.yaml')!r}), num_cuda_devices=0)\n"
        "sys.exit(bool({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
