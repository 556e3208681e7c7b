"""Prepares a run, makes the start model, runs a stage's ranks and checks the result, as Prefect tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.settings import PREFECT_API_URL

from weightline.deployments.ranks.context import OBSERVER, rank_environment, write_rank_context
from weightline.deployments.server.artifacts import ProgressBoard
from weightline.deployments.server.flow_runs import flow_run_provenance
from weightline.runs.folder import Run
from weightline.runs.prepare import prepare_run
from weightline.runs.stage import StageProof, prove_stage, run_stage
from weightline.runs.stage_page import StageWatch
from weightline.stages.job import StageJob
from weightline.stages.recipe import StageKind


@task(task_run_name="check recipe and bucket", cache_policy=NO_CACHE, persist_result=False)
def open_or_prepare_run(
    recipe: str | None,
    runs_dir: str,
    run_id: str | None,
    chain: str | None,
    stages: Sequence[StageKind] = (),
    start_from: str | None = None,
) -> Run:
    """Checks the recipe and the bucket and writes the run's folder, or opens the run to resume. Safe to repeat."""
    return prepare_run(recipe, runs_dir, run_id, chain, kinds=stages, start_from=start_from)


@task(task_run_name="make start model", cache_policy=NO_CACHE, persist_result=False)
def make_start_model(run: Run) -> Path:
    """Writes the folder that the first stage starts from. Safe to repeat: a finished folder is left as it is."""
    marker = run.start_model_dir / ".complete"
    if not marker.exists():
        from weightline.stages.model import materialize_model  # imports torch, which a resumed run does without

        materialize_model(run.recipe.model, run.start_model_dir, run.recipe.seed, run.recipe.dtype)
        marker.touch()
    return run.start_model_dir


@task(task_run_name="ranks of {job.stage.kind}", cache_policy=NO_CACHE, persist_result=False)
def run_stage_ranks(run: Run, job: StageJob) -> None:
    """Runs accelerate launch until it ends.

    Writes the output of the ranks to the flow run's log and the progress to an artifact; the ranks show their steps as
    task runs. A repeated call resumes from the stage's last checkpoint. Raises LaunchError with the last lines of the
    failing rank.
    """
    job.output_dir.mkdir(parents=True, exist_ok=True)
    context_path = job.output_dir / "flow_run.json"
    write_rank_context(context_path)
    environment = rank_environment(context_path, PREFECT_API_URL.value(), {})
    recorded = job.model_copy(update={"step_observer": OBSERVER, "provenance": flow_run_provenance()})
    watch = StageWatch(run, job)
    name = f"{run.run_id}-{job.stage.kind}"
    with ProgressBoard(name, f"{watch.title}: optimizer steps", watch.draw_page) as board:

        def tick() -> None:
            board.report(watch.look(), watch.max_steps)

        run_stage(run, recorded, environment, get_run_logger().info, tick)


@task(task_run_name="compare {job.stage.kind} with the chain", cache_policy=NO_CACHE, persist_result=False)
def prove_equality(run: Run, job: StageJob) -> StageProof:
    """Replays the stage's last version from the bucket and compares every bit with what the trainer saved.

    Safe to repeat. Raises DigestMismatchError with the names of the tensors that differ.
    """
    proof = prove_stage(run, job)
    get_run_logger().info(
        "version %d, replayed from the bucket, is bit-equal to what trainer.save_model wrote: %d tensors, %d elements",
        proof.version, proof.num_tensors, proof.num_elements,
    )  # fmt: skip
    return proof
