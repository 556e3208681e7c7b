"""Train a model through the stages of a recipe; every sync becomes a version of one chain."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.runtime import flow_run

from tasks.names import lineage_key
from tasks.run_folder import open_run
from tasks.training import finished_version, make_start_model, open_or_prepare_run, prove_equality, run_stage_ranks


def _name_run() -> str:
    return str(flow_run.parameters.get("run_id") or flow_run.parameters.get("recipe") or "post-training")


def _name_stage() -> str:
    return f"{flow_run.parameters['kind']} of {flow_run.parameters['run_dir'].rpartition('/')[2]}"


@flow(name="post-training", flow_run_name=_name_run, persist_result=False)
def post_training(
    recipe: str | None = "deployments/recipes/arithmetic.yaml",
    run_id: str | None = None,
    runs_dir: str = "runs",
    chain: str | None = None,
) -> dict[str, Any]:
    """Train through all stages of a recipe.

    Args:
        recipe: Path of a recipe file. Leave as it is when a run is resumed.
        run_id: Name of a run. One that exists is resumed: finished stages are skipped, the broken one goes on from its
            last checkpoint. Empty: a new run.
        runs_dir: Folder of all runs.
        chain: URL of the bucket and chain to commit to. Empty: a folder of the run.
    """
    run = open_or_prepare_run(recipe, runs_dir, run_id, chain)
    lineage = lineage_key(run.open_chain().name)
    get_run_logger().info("run %s commits to %s; its lineage is artifact %s", run.run_id, run.chain_url, lineage)
    make_start_model(run)
    equality = {stage.kind: train_stage(str(run.folder), stage.kind) for stage in run.recipe.stages}
    return {"run_id": run.run_id, "chain": run.chain_url, "equality": equality}


@flow(name="train-stage", flow_run_name=_name_stage, persist_result=False)
def train_stage(run_dir: str, kind: str) -> dict[str, Any]:
    """Train one stage, unless it is finished, and prove that the chain holds its result bit for bit.

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
