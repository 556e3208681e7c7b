"""One run of a recipe: its id, its folder, its chain. What a flow needs to find everything again from the id alone.

runs/<id>/recipe.json           the recipe as it was resolved; a resumed run reads it, never another one
runs/<id>/model/                what the first stage starts from
runs/<id>/stages/<kind>/        checkpoints, metrics.jsonl, model/, done.json (weightline.stages.job), rank logs
runs/<id>/bucket/<chain>/       the chain, unless another bucket was named
runs/<id>/summary.json          the end of `weightline run`
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import write_record
from weightline.chain.read.refs import resolve
from weightline.errors import InputError, NotFoundError, RecipeError
from weightline.format.keys import checked_name
from weightline.launch.machines import RUNS_DIR_VARIABLE
from weightline.runs.checks import PATIENCE_SECONDS, check_form
from weightline.stages.job import StageJob, write_atomically
from weightline.stages.load import load_recipe
from weightline.stages.preflight import Placement, check_recipe
from weightline.stages.recipe import FrozenModel, ModelConfig, Recipe, StageConfig, StageKind, parse_start
from weightline.store import open_store
from weightline.store.open import check_writable

#: Records of runs: which recipe made the versions that bear the run's id. Consumers find the evaluation's task there.
RUNS = "runs"
_RUN_FILE = "run.json"


class _RunFile(FrozenModel):
    """What is written down about a run."""

    run_id: str
    chain: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Run:
    """A run that passed every check. `folder` is absolute, and `chain_url` how the store itself spells it."""

    run_id: str
    folder: Path
    chain_url: str
    recipe: Recipe
    placement: Placement

    @property
    def start_model_dir(self) -> Path:
        return self.folder / "model"

    @property
    def summary_path(self) -> Path:
        return self.folder / "summary.json"

    def stage_dir(self, kind: str) -> Path:
        """Where a stage keeps everything; `StageJob.output_dir`."""
        return self.folder / "stages" / kind

    def equality_path(self, kind: str) -> Path:
        """Says which version was proved bit-equal to the stage's model/."""
        return self.stage_dir(kind) / "equality.json"

    def stage(self, kind: str) -> StageConfig:
        """The recipe's stage of this kind. InputError when it has none."""
        for stage in self.recipe.stages:
            if stage.kind == kind:
                return stage
        raise InputError(f"run {self.run_id} has no stage {kind!r}", field="kind")

    def job(self, kind: str) -> StageJob:
        """What the ranks of a stage are told: to start from the stage before, or from the start model."""
        stage = self.stage(kind)
        index = self.recipe.stages.index(stage)
        before = self.stage_dir(self.recipe.stages[index - 1].kind) / "model" if index else self.start_model_dir
        return StageJob(
            stage=stage,
            arithmetic=self.recipe.arithmetic,
            model_dir=before,
            output_dir=self.stage_dir(kind),
            run_id=self.run_id,
            seed=self.recipe.seed,
            device=self.placement.device,
            chain_url=self.chain_url,
        )

    def open_chain(self) -> Chain:
        return open_chain(self.chain_url)


def new_run_id(recipe_name: str, at: datetime | None = None) -> str:
    """ "arithmetic" -> "arithmetic-20261124-065012": sorts by time, may stand in keys and URLs."""
    return f"{recipe_name}-{(at or datetime.now(UTC)):%Y%m%d-%H%M%S}"


def prepare_run(
    recipe_path: str | Path | None,
    runs_dir: str | Path,
    run_id: str | None = None,
    chain_url: str | None = None,
    *,
    kinds: Sequence[StageKind] = (),
    start_from: str | None = None,
) -> Run:
    """Check everything that can be checked before anything is trained, then write the run's folder and record.

    `kinds` takes some of the recipe's stages, `start_from` another start model (weightline.stages.recipe.parse_start).
    A `run_id` that has a folder is resumed: with its own recipe; another recipe is refused. Safe to repeat. RecipeError
    names the field and the remedy, InputError or StorageError the bucket that cannot be written.
    """
    with check_form("start_from"):
        start = parse_start(start_from) if start_from is not None else None
    if run_id is not None and (runs_dir_of(runs_dir) / run_id / _RUN_FILE).exists():
        run = open_run(runs_dir_of(runs_dir) / run_id)
        if recipe_path is not None:
            _require_same_recipe(run, load_recipe(recipe_path).choose(kinds, start), recipe_path)
        return run
    if recipe_path is None:
        _refuse_without_recipe(run_id, runs_dir)
    recipe = load_recipe(recipe_path).choose(kinds, start)
    with _told_as_start_from(start):
        placement = check_recipe(recipe)
    recipe = _pinned(recipe)
    run_id = checked_name(run_id or new_run_id(recipe.name))
    folder = runs_dir_of(runs_dir) / run_id
    with check_form("chain" if chain_url else "runs_dir"):
        store = open_store(chain_url or (folder / "bucket" / run_id).as_uri(), PATIENCE_SECONDS)
        check_writable(store)
    run = Run(run_id, folder, store.url, recipe, placement)
    _write(run)
    return run


def open_run(folder: str | Path) -> Run:
    """The run in a folder that `prepare_run` wrote. InputError when it is none; RecipeError as in `prepare_run`."""
    folder = Path(folder).absolute()
    written = _read(folder)
    return Run(written.run_id, folder, written.chain, written.recipe, check_recipe(written.recipe))


def chain_of_run(folder: str | Path) -> str:
    """The chain of the run in a folder, whether this machine could run it or not. InputError when it is no run."""
    return _read(Path(folder).absolute()).chain


def _read(folder: Path) -> _RunFile:
    try:
        return _RunFile.model_validate_json((folder / _RUN_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{folder} is no folder of a run: {error}", path=str(folder)) from error


def default_runs_dir() -> str:
    """Where runs are kept that name no folder: WEIGHTLINE_RUNS_DIR, which a stack sets, or `runs`."""
    return os.environ.get(RUNS_DIR_VARIABLE) or "runs"


def runs_dir_of(runs_dir: str | Path) -> Path:
    """The folder of all runs, absolute."""
    return Path(runs_dir).expanduser().absolute()


def _refuse_without_recipe(run_id: str | None, runs_dir: str | Path) -> NoReturn:
    if run_id is None:
        raise InputError("recipe: name one, or the run to resume", field="recipe")
    message = f"run_id: there is no run {run_id} in {runs_dir}: name one that is there, or a recipe"
    raise NotFoundError(message, key=run_id, field="run_id")


@contextmanager
def _told_as_start_from(start: ModelConfig | None) -> Iterator[None]:
    """What is wrong with the model is wrong with `start_from`, where that named it."""
    try:
        yield
    except RecipeError as error:
        if start is None or not str(error.facts.get("field")).startswith("model."):
            raise
        with check_form("start_from"):
            raise


def _pinned(recipe: Recipe) -> Recipe:
    """With the number of the version that it starts from: `tip` is another one tomorrow."""
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


def _write(run: Run) -> None:
    chain = run.open_chain()
    tip = chain.tip_version()
    record = {"status": "done", "recipe": run.recipe.model_dump(mode="json")}
    write_record(chain, RUNS, 0 if tip is None else tip + 1, run.run_id, record)
    written = _RunFile(run_id=run.run_id, chain=run.chain_url, recipe=run.recipe)
    write_atomically(run.folder / _RUN_FILE, written.model_dump_json(indent=1))
