"""Trains a model through the stages of a recipe. Every sync commits a version to one chain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from prefect import flow, get_run_logger, tags
from prefect.runtime import flow_run

from weightline.deployments.server.artifacts import lineage_key
from weightline.deployments.server.automations import WATCHED_TAG
from weightline.deployments.server.flow_runs import run_id_of_flow_run
from weightline.flows.forms import RunsDir, StageNames, label
from weightline.runs.folder import default_runs_dir, open_run
from weightline.runs.lock import exclusive_training_lock
from weightline.runs.stage import StageProof, finished_version
from weightline.tasks.training import make_start_model, open_or_prepare_run, prove_equality, run_stage_ranks


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The result of a run whose stages have all finished, with the equality proof of each."""

    run_id: str
    chain: str
    proofs: dict[str, StageProof]


def _name_run() -> str:
    recipe = Path(flow_run.parameters.get("recipe") or "post-training").stem
    return str(flow_run.parameters.get("run_id") or recipe)


def _name_stage() -> str:
    return f"{flow_run.parameters['kind']} of {flow_run.parameters['run_dir'].rpartition('/')[2]}"


@flow(name="post-training", flow_run_name=_name_run, persist_result=False)
def post_training(
    recipe: Annotated[str | None, label("Recipe", min_length=1)] = "arithmetic",
    stages: StageNames = [],  # noqa: B006 - never changed; a form shows an empty choice only for this default
    start_from: Annotated[str | None, label("Start from", min_length=1)] = None,
    run_id: Annotated[str | None, label("Run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")] = None,
    runs_dir: RunsDir = None,
    chain: Annotated[str | None, label("Chain", min_length=1)] = None,
) -> TrainedRun:
    """Train through the stages of a recipe, in its order.

    Args:
        recipe: Path of a recipe file, or name of a shipped recipe. Clear it to resume a run that has another recipe.
        stages: Train only these stages of the recipe. Empty: all.
        start_from: A Hub id, a folder, or a version of a chain, as in file:///data/bucket/my-model@12 (or @tip). Empty:
            the model of the recipe.
        run_id: Name of a run. A run that exists is resumed: finished stages are skipped, and the unfinished stage
            continues from its last checkpoint. Empty: a new run.
        runs_dir: Folder of all runs. Empty: that of the stack, or `runs`.
        chain: URL of the bucket and chain to commit to. Empty: a new chain in the run's folder.
    """
    run = open_or_prepare_run(
        recipe, runs_dir or default_runs_dir(), run_id or run_id_of_flow_run(recipe), chain, stages, start_from
    )
    lineage = lineage_key(run.open_chain().name)
    get_run_logger().info("run %s commits to %s; its lineage is artifact %s", run.run_id, run.chain_url, lineage)
    with exclusive_training_lock(run.chain_url, run.run_id):
        make_start_model(run)
        # The automation for lost runs watches this tag. A stage's run gets no tag from a deployment.
        with tags(WATCHED_TAG):
            proofs: dict[str, StageProof] = {
                stage.kind: train_stage(str(run.folder), stage.kind) for stage in run.recipe.stages
            }
    return TrainedRun(run.run_id, run.chain_url, proofs)


@flow(name="train-stage", flow_run_name=_name_stage, persist_result=False)
def train_stage(run_dir: str, kind: str) -> StageProof:
    """Train one stage, unless it is finished, and check that the chain holds its result bit for bit.

    Args:
        run_dir: Folder of the run.
        kind: The stage: sft, dpo or grpo.
    """
    run = open_run(run_dir)
    job = run.job(kind)
    finished = finished_version(job, run.open_chain())
    if finished is None:
        run_stage_ranks(run, job)
    else:
        get_run_logger().info("%s is finished already: version %d", kind, finished.version)
    return prove_equality(run, job)
