"""Prepares a run: every check that needs no training, then the run's folder and the record of its recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from weightline.chain import open_chain
from weightline.chain.read.refs import resolve
from weightline.errors import InputError, NotFoundError, RecipeError
from weightline.format.keys import checked_name
from weightline.runs.checks import PATIENCE_SECONDS, check_form
from weightline.runs.folder import Run, is_run, new_run_id, open_run, runs_dir_of
from weightline.runs.recipes import record_recipe
from weightline.stages.load import load_recipe
from weightline.stages.preflight import check_recipe
from weightline.stages.recipe import ModelConfig, Recipe, StageKind, parse_start
from weightline.store import open_store
from weightline.store.open import check_writable


def prepare_run(
    recipe_path: str | Path | None,
    runs_dir: str | Path,
    run_id: str | None = None,
    chain_url: str | None = None,
    *,
    kinds: Sequence[StageKind] = (),
    start_from: str | None = None,
    patience_seconds: float = PATIENCE_SECONDS,
) -> Run:
    """Makes all checks that need no training, then writes the run's folder and record.

    `kinds` selects some of the recipe's stages, `start_from` a start model (weightline.stages.recipe.parse_start).
    A `run_id` that has a folder is resumed with its own recipe; InputError for any other recipe. Safe to repeat. Raises
    RecipeError with the field and the remedy, or InputError or StorageError for a bucket that cannot be written.
    `patience_seconds` is the retry deadline of the bucket.
    """
    with check_form("start_from"):
        start = parse_start(start_from) if start_from is not None else None
    if run_id is not None and is_run(runs_dir_of(runs_dir) / run_id):
        run = open_run(runs_dir_of(runs_dir) / run_id)
        if recipe_path is not None:
            _require_same_recipe(run, load_recipe(recipe_path).choose(kinds, start), recipe_path)
        return run
    if recipe_path is None:
        _refuse_without_recipe(run_id, runs_dir)
    recipe = load_recipe(recipe_path).choose(kinds, start)
    with _reported_as_start_from(start):
        placement = check_recipe(recipe)
    recipe = _pinned(recipe)
    run_id = checked_name(run_id or new_run_id(recipe.name))
    folder = runs_dir_of(runs_dir) / run_id
    with check_form("chain" if chain_url else "runs_dir"):
        store = open_store(chain_url or (folder / "bucket" / run_id).as_uri(), patience_seconds)
        check_writable(store)
    run = Run(run_id, folder, store.url, recipe, placement)
    record_recipe(run.open_chain(), run_id, recipe)
    run.save()
    return run


def _refuse_without_recipe(run_id: str | None, runs_dir: str | Path) -> NoReturn:
    if run_id is None:
        raise InputError("recipe: name one, or the run to resume", field="recipe")
    message = f"run_id: there is no run {run_id} in {runs_dir}: name an existing one, or a recipe"
    raise NotFoundError(message, key=run_id, field="run_id")


@contextmanager
def _reported_as_start_from(start: ModelConfig | None) -> Iterator[None]:
    """Names the field `start_from` in an error about the model, if that field gave the model."""
    try:
        yield
    except RecipeError as error:
        if start is None or not str(error.facts.get("field")).startswith("model."):
            raise
        with check_form("start_from"):
            raise


def _pinned(recipe: Recipe) -> Recipe:
    """Returns the recipe with the number of the version that it starts from, since refs such as `tip` move."""
    if recipe.model.chain is None:
        return recipe
    number = resolve(open_chain(recipe.model.chain), recipe.model.version)
    return _with_version(recipe, str(number))


def _with_version(recipe: Recipe, version: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"version": version})})


def _require_same_recipe(run: Run, recipe: Recipe, recipe_path: str | Path) -> None:
    if recipe.model.chain is not None and not recipe.model.version.isdigit():
        recipe = _with_version(recipe, run.recipe.model.version)
    if recipe != run.recipe:
        raise InputError(
            f"recipe: run {run.run_id} was started with another recipe than {recipe_path}: resume it without naming "
            "one, or start a new run",
            field="recipe",
        )
