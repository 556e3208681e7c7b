"""The tasks of training: prepare a run, make the start model, run a stage's ranks, prove what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL

from weightline.chain import Chain
from weightline.deployments.ranks.context import STEPS, rank_environment, write_rank_context
from weightline.deployments.server.artifacts import ProgressBoard
from weightline.errors import DigestMismatchError, InputError
from weightline.format.manifest import Manifest
from weightline.launch.command import launch_argv, launch_environment
from weightline.launch.machines import calling, new_call
from weightline.launch.ranks import run_ranks, with_rank_logs
from weightline.runs.equality import differing_tensors
from weightline.runs.folder import Run, new_run_id, prepare_run
from weightline.runs.stage_page import StageWatch
from weightline.stages.job import StageJob, StageResult, write_atomically
from weightline.stages.load import load_recipe
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
    """See weightline.runs.folder.prepare_run."""
    return prepare_run(recipe, runs_dir, run_id, chain, kinds=stages, start_from=start_from)


def run_id_of_flow_run(recipe: str | None) -> str | None:
    """The id of a run that nobody named: the same when its flow run is retried, so that a retry resumes it."""
    context = FlowRunContext.get()
    if recipe is None or context is None or context.flow_run is None:
        return None
    return f"{new_run_id(load_recipe(recipe).name, context.flow_run.created)}-{context.flow_run.id.hex[:4]}"


@task(task_run_name="make start model", cache_policy=NO_CACHE, persist_result=False)
def make_start_model(run: Run) -> Path:
    """The folder that the first stage starts from. Safe to repeat: a finished folder is left as it is."""
    from weightline.stages.model import materialize_model

    marker = run.start_model_dir / ".complete"
    if not marker.exists():
        materialize_model(run.recipe.model, run.start_model_dir, run.recipe.seed)
        marker.touch()
    return run.start_model_dir


@task(task_run_name="ranks of {job.stage.kind}", cache_policy=NO_CACHE, persist_result=False)
def run_stage_ranks(run: Run, job: StageJob) -> None:
    """Run accelerate launch to its end: lines to the flow run's log, progress to an artifact, steps as task runs.

    LaunchError carries the failing rank's last lines. Repeating it resumes from the stage's last checkpoint.
    """
    logger = get_run_logger()
    kind = job.stage.kind
    job.output_dir.mkdir(parents=True, exist_ok=True)
    job_path = job.output_dir / "job.json"
    job.model_copy(update={"steps_hook": STEPS, "provenance": _provenance()}).save(job_path)
    context_path = job.output_dir / "flow_run.json"
    write_rank_context(context_path)
    # What libraries will change in their next release is no news to whoever reads a run's log.
    own = launch_environment(job, {"PYTHONWARNINGS": "ignore::FutureWarning", **os.environ})
    env = rank_environment(context_path, PREFECT_API_URL.value(), own)
    watch = StageWatch(run, job)
    log_path, log_dir = job.output_dir / "ranks.log", job.output_dir / "rank-logs"
    with (
        ProgressBoard(f"{run.run_id}-{kind}", f"{watch.title}: optimizer steps", watch.draw_page) as board,
        launching(run, job_path, rank_environment(context_path, PREFECT_API_URL.value(), {})) as argv,
    ):

        def tick() -> None:
            board.report(watch.look(), watch.max_steps)

        run_ranks(with_rank_logs(argv, log_dir), env, log_path, logger.info, tick)


def _provenance() -> dict[str, str]:
    """What links a version to the run that made it."""
    context = FlowRunContext.get()
    return {"flow_run_id": str(context.flow_run.id)} if context is not None and context.flow_run is not None else {}


@contextmanager
def launching(run: Run, job_path: Path, environment: dict[str, str]) -> Iterator[list[str]]:
    """The launch command of this machine; where the recipe wants several, the others are called meanwhile."""
    place, machines = run.placement, run.recipe.num_machines
    if machines == 1:
        yield launch_argv(job_path, place.num_processes, place.device)
        return
    call = new_call(job_path, place.num_processes, place.device, machines, environment)
    with calling(run.folder.parent, call):
        yield call.argv(machine_rank=0)


@task(task_run_name="compare {job.stage.kind} with the chain", cache_policy=NO_CACHE, persist_result=False)
def prove_equality(run: Run, job: StageJob) -> dict[str, Any]:
    """Replay the stage's last version from the bucket and compare every bit with what the trainer saved.

    DigestMismatchError names the tensors that differ.
    """
    chain = run.open_chain()
    manifest = last_version(newest_first(chain), job.stage.kind, run.run_id)
    if manifest is None:
        raise InputError(f"{chain.url} has no version of stage {job.stage.kind} of run {run.run_id}")
    different = differing_tensors(chain, manifest.version, job.final_model_dir)
    if different:
        raise DigestMismatchError(
            f"version {manifest.version} of {chain.url} is not what the trainer saved in {job.final_model_dir}: "
            f"{', '.join(different)}",
            what=different[0], expected=str(job.final_model_dir), actual=f"version {manifest.version}",
        )  # fmt: skip
    get_run_logger().info(
        "version %d, replayed from the bucket, is bit-equal to what trainer.save_model wrote: %d tensors, %d elements",
        manifest.version, len(manifest.tensors), manifest.num_elements,
    )  # fmt: skip
    proof = {"version": manifest.version, "commit_id": manifest.commit_id, "is_bit_equal": True}
    write_atomically(run.equality_path(job.stage.kind), json.dumps(proof))
    return proof


def newest_first(chain: Chain) -> Iterator[Manifest]:
    """The chain's manifests, each read when it is asked for: what a run looks for is near the tip."""
    return (chain.manifest(version) for version in reversed(chain.versions()))


def last_version(manifests: Iterable[Manifest], stage: str, run_id: str) -> Manifest | None:
    """The newest version that this stage of this run committed. `manifests`: newest first. Pure."""
    return next((m for m in manifests if m.stage == stage and m.run_id == run_id), None)


def finished_version(job: StageJob, chain: Chain) -> Manifest | None:
    """The stage's last version when the stage is finished: its marker stands, and the chain has what it vouches for."""
    result = StageResult.load(job)
    manifest = None if result is None else last_version(newest_first(chain), job.stage.kind, job.run_id)
    if result is None or manifest is None or not manifest.is_milestone:
        return None
    return manifest if manifest.global_step == result.global_step else None
