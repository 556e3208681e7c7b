"""Runs one stage of a run: launches its ranks, finds the last version of the stage, and proves that version's bits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import ValidationError
from safetensors import deserialize

from weightline.chain import Chain
from weightline.chain.replay.state import HostState, read_state
from weightline.errors import DigestMismatchError, InputError
from weightline.files import write_atomically
from weightline.format.manifest import Header
from weightline.launch.command import launch_environment
from weightline.launch.machines import launching
from weightline.launch.ranks import run_ranks, with_rank_logs
from weightline.launch.replica import kept_replica
from weightline.runs.folder import Run
from weightline.stages.job import StageJob, StageResult
from weightline.stages.recipe import FrozenModel


def run_stage(
    run: Run, job: StageJob, environment: Mapping[str, str], show: Callable[[str], None], tick: Callable[[], None]
) -> None:
    """Writes the job file and runs `accelerate launch` to its end, on every machine of the recipe.

    Ranks get `environment` in addition to that of their machine. Their lines go to `ranks.log` and, at a limited rate,
    to `show`; `tick` is called about twice per second. A repeated call resumes from the stage's last checkpoint. Raises
    LaunchError with the failing rank's last lines.
    """
    job_path = job.output_dir / "job.json"
    job.save(job_path)
    # FutureWarnings of libraries do not concern the run.
    env = launch_environment(job, {"PYTHONWARNINGS": "ignore::FutureWarning", **os.environ, **environment})
    with ExitStack() as held:
        look = held.enter_context(_replica_of(job))
        argv = held.enter_context(
            launching(
                job_path, run.folder.parent, num_processes=run.placement.num_processes, device=run.placement.device,
                num_machines=run.recipe.num_machines, environment=environment,
            )
        )  # fmt: skip

        def tick_all() -> None:
            look()
            tick()

        log_path = job.output_dir / "ranks.log"
        run_ranks(with_rank_logs(argv, job.output_dir / "rank-logs"), env, log_path, show, tick_all)


@contextmanager
def _replica_of(job: StageJob) -> Iterator[Callable[[], None]]:
    """Runs the replica of a stage that asks for a local one, and yields what looks after it."""
    rollouts = job.stage.rollouts
    if rollouts is None or rollouts.replicas != "local" or job.chain_url is None:
        yield lambda: None
        return
    # The ranks announce every version to it. It looks by itself as well.
    every = 0.2 if job.chain_url.startswith("file:") else 2.0
    options = ("--every", str(every), "--name", f"{job.stage.kind}-rollouts", "--device", job.device)
    with kept_replica(job.chain_url, job.replica_dir, os.getpid(), *options) as look:
        yield look


def last_version(manifests: Iterable[Header], stage: str, run_id: str) -> Header | None:
    """Returns the newest version that this stage of this run committed. `manifests`: newest first. Pure."""
    return next((m for m in manifests if m.stage == stage and m.run_id == run_id), None)


def finished_version(job: StageJob, chain: Chain) -> Header | None:
    """Returns the stage's last version if the stage is finished: its marker and the chain name the same step."""
    result = StageResult.load(job)
    manifest = None if result is None else last_version(chain.headers_newest_first(), job.stage.kind, job.run_id)
    if result is None or manifest is None or not manifest.is_milestone:
        return None
    return manifest if manifest.global_step == result.global_step else None


class StageProof(FrozenModel):
    """The contents of equality.json: the version that was compared, bit for bit, with the trainer's saved files."""

    version: int
    commit_id: str
    is_bit_equal: bool
    num_tensors: int
    num_elements: int


def prove_stage(run: Run, job: StageJob) -> StageProof:
    """Replays the stage's last version from the bucket, compares every bit with the trainer's files, writes the proof.

    Raises DigestMismatchError with the names of the tensors that differ; nothing is written then.
    """
    chain = run.open_chain()
    manifest = last_version(chain.headers_newest_first(), job.stage.kind, run.run_id)
    if manifest is None:
        raise InputError(f"{chain.url} has no version of stage {job.stage.kind} of run {run.run_id}")
    different = differing_tensors(chain, manifest.version, job.final_model_dir)
    if different:
        raise DigestMismatchError(
            f"version {manifest.version} of {chain.url} differs from the trainer's files in {job.final_model_dir}, in "
            f"{', '.join(different)}",
            what=different[0], expected=str(job.final_model_dir), actual=f"version {manifest.version}",
        )  # fmt: skip
    proof = StageProof(
        version=manifest.version, commit_id=manifest.commit_id, is_bit_equal=True,
        num_tensors=len(chain.layout(manifest.version)), num_elements=manifest.num_elements,
    )  # fmt: skip
    write_atomically(run.equality_path(job.stage.kind), proof.model_dump_json())
    return proof


def read_proof(run: Run, kind: str) -> StageProof | None:
    """Reads the proof of a stage. Returns None when there is none."""
    try:
        return StageProof.model_validate_json(run.equality_path(kind).read_bytes())
    except (OSError, ValidationError):
        return None


def differing_tensors(chain: Chain, version: int, model_dir: Path) -> list[str]:
    """Returns the names of tensors whose dtype, shape or any bit differs, or that only one side has. Reads only.

    A tensor that the version holds in float16 and the folder in float32 is compared after a cast: what a recipe with
    `dtype: float16` trains.

    Replays the version from the bucket and compares bytes, not digests. Raises the errors of a replay.
    """
    state = read_state(chain, version)
    saved: set[str] = set()
    different: list[str] = []
    for tensor in _saved_tensors(model_dir):
        saved.add(tensor.name)
        if not _is_equal(state, tensor):
            different.append(tensor.name)
    return sorted({*different, *(state.specs.keys() - saved)})


class _SavedTensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def _is_equal(state: HostState, saved: _SavedTensor) -> bool:
    spec = state.specs.get(saved.name)
    if spec is not None and (spec.dtype, saved.dtype) == ("F16", "F32"):
        with np.errstate(over="ignore"):  # beyond the range of float16 lies infinity, in the chain as well
            data = np.frombuffer(saved.data, "<f4").astype("<f2").tobytes()
        saved = saved._replace(dtype="F16", data=data)
    if spec is None or (spec.dtype, spec.shape) != (saved.dtype, saved.shape):
        return False
    return state.bits[saved.name].tobytes() == saved.data


def _saved_tensors(model_dir: Path) -> Iterator[_SavedTensor]:
    """Yields every tensor of the folder's safetensors files, one file in memory at a time."""
    for path in sorted(model_dir.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):  # type: ignore[no-untyped-call]
            yield _SavedTensor(name, tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
