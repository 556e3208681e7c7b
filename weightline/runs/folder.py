"""A run of a recipe: its id, its folder, its chain. A flow reads all of a run's state from the folder alone.

runs/<id>/run.json              id, chain, and the resolved recipe, which a resumed run uses
runs/<id>/model/                the model that the first stage starts from
runs/<id>/stages/<kind>/        checkpoints, metrics.jsonl, model/, done.json (weightline.stages.job), rank logs
runs/<id>/bucket/<chain>/       the chain, unless another bucket was named
runs/<id>/summary.json          the results, written at the end of `weightline run`
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from weightline.chain import Chain, open_chain
from weightline.errors import InputError, WeightlineError
from weightline.files import user_path, write_atomically
from weightline.launch.machines import RUNS_DIR_VARIABLE
from weightline.stages.job import StageJob
from weightline.stages.preflight import Placement, check_recipe
from weightline.stages.recipe import FrozenModel, Recipe, StageConfig
from weightline.store import open_store

#: Environment variable: URLs of further chains for `reconcile`, besides those of the runs folder, separated by spaces.
CHAINS_VARIABLE = "WEIGHTLINE_CHAINS"
_RUN_FILE = "run.json"


class _RunFile(FrozenModel):
    """The contents of run.json."""

    run_id: str
    chain: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Run:
    """A run that passed every check. `folder` is absolute; `chain_url` has the store's spelling."""

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
        """Returns the folder of a stage; `StageJob.output_dir`."""
        return self.folder / "stages" / kind

    def equality_path(self, kind: str) -> Path:
        """Returns the file that says which version was proved bit-equal to the stage's model/."""
        return self.stage_dir(kind) / "equality.json"

    def stage(self, kind: str) -> StageConfig:
        """Returns the recipe's stage of this kind. Raises InputError when it has none."""
        for stage in self.recipe.stages:
            if stage.kind == kind:
                return stage
        raise InputError(f"run {self.run_id} has no stage {kind!r}", field="kind")

    def job(self, kind: str) -> StageJob:
        """Returns the job of a stage's ranks. It starts from the result of the stage before, or the start model."""
        stage = self.stage(kind)
        index = self.recipe.stages.index(stage)
        before = self.stage_dir(self.recipe.stages[index - 1].kind) / "model" if index else self.start_model_dir
        return StageJob(
            dtype=self.recipe.dtype,
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

    def save(self) -> None:
        """Writes run.json, which makes the folder a run. Safe to repeat. A crash leaves a complete file or none."""
        written = _RunFile(run_id=self.run_id, chain=self.chain_url, recipe=self.recipe)
        write_atomically(self.folder / _RUN_FILE, written.model_dump_json(indent=1))


def new_run_id(recipe_name: str, at: datetime | None = None) -> str:
    """Returns an id that sorts by time and is valid in keys and URLs: "arithmetic" -> "arithmetic-20261124-065012"."""
    return f"{recipe_name}-{(at or datetime.now(UTC)):%Y%m%d-%H%M%S}"


def is_run(folder: Path) -> bool:
    """Returns whether the folder holds a run, finished or not."""
    return (folder / _RUN_FILE).exists()


def open_run(folder: str | Path) -> Run:
    """Opens the run in a folder. Raises InputError when it holds none, RecipeError when this machine cannot run it."""
    folder = Path(folder).absolute()
    written = _read(folder)
    return Run(written.run_id, folder, written.chain, written.recipe, check_recipe(written.recipe))


def chain_of_run(folder: str | Path) -> str:
    """Returns the chain of a run, even if this machine cannot run it. InputError when the folder holds no run."""
    return _read(Path(folder).absolute()).chain


def default_runs_dir() -> str:
    """Returns the folder of all runs when none is named: WEIGHTLINE_RUNS_DIR, which a stack sets, or `runs`."""
    return os.environ.get(RUNS_DIR_VARIABLE) or "runs"


def runs_dir_of(runs_dir: str | Path) -> Path:
    """Returns the folder of all runs as an absolute path."""
    return user_path(runs_dir).absolute()


def configured_chains(runs_dir: str | Path) -> list[str]:
    """Returns the chains of WEIGHTLINE_CHAINS, then those of the runs folder, newest run first, each once."""
    named = os.environ.get(CHAINS_VARIABLE, "").split()
    return list(dict.fromkeys(canonical_url(chain) for chain in (*named, *_chains_of_runs(runs_dir))))


def canonical_url(chain: str) -> str:
    """Returns the canonical spelling of a chain's URL. A text that names no store is returned unchanged."""
    try:
        return open_store(chain).url
    except (WeightlineError, ValueError):
        return chain


def _chains_of_runs(runs_dir: str | Path) -> Iterator[str]:
    """Yields the chains of all runs, newest run first. Other folders are skipped."""
    runs = sorted(runs_dir_of(runs_dir).glob(f"*/{_RUN_FILE}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        try:
            yield chain_of_run(path.parent)
        except WeightlineError:
            continue


def _read(folder: Path) -> _RunFile:
    try:
        return _RunFile.model_validate_json((folder / _RUN_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{folder} is not the folder of a run: {error}", path=str(folder)) from error
