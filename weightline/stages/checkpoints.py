"""Writes the metrics of a stage, marks its checkpoints, and chooses the checkpoint to resume from.

The trainer writes checkpoint-N/ in place, rank by rank. A rank that is killed meanwhile leaves an incomplete folder
that looks like a checkpoint. So each rank writes a mark after its part, and a folder without the marks of all ranks is
ignored.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightline.errors import InputError
from weightline.files import write_atomically
from weightline.stages.job import StageJob

_MARK = re.compile(r"rank-(\d+)-of-(\d+)\.whole")


@dataclass(frozen=True, slots=True)
class ResumePlan:
    """The checkpoint that a stage starts from, and the remains of earlier processes to delete first."""

    checkpoint: Path | None
    global_step: int
    stale: tuple[Path, ...]


def checkpoint_step(folder: Path) -> int:
    """Returns the step of a checkpoint's folder: checkpoint-120 -> 120."""
    return int(folder.name.rpartition("-")[2])


def mark_whole(folder: Path, rank: int, world_size: int) -> None:
    """Marks this rank's part of the checkpoint as complete. Call it last. Safe to repeat."""
    (folder / f"rank-{rank}-of-{world_size}.whole").touch()


def plan_resume(job: StageJob, world_size: int) -> ResumePlan:
    """Plans to resume from the newest complete checkpoint.

    All ranks make the same plan, even while rank 0 deletes stale folders, which are never chosen.

    InputError when the newest complete checkpoint was written by another number of ranks, since ZeRO-3 partitions the
    optimizer state over the ranks that wrote it.
    """
    folders = sorted(job.output_dir.glob("checkpoint-*"), key=checkpoint_step)
    if not job.resume:
        leftovers = (job.done_path, job.final_model_dir, job.metrics_path)
        return ResumePlan(None, 0, (*folders, *(path for path in leftovers if path.exists())))
    whole = [folder for folder in folders if _world_size_of(folder) is not None]
    if not whole:
        return ResumePlan(None, 0, tuple(folders))
    newest = whole[-1]
    if _world_size_of(newest) != world_size:
        num_ranks = _world_size_of(newest)
        message = f"{newest} was written by {num_ranks} ranks and {world_size} are running: run with num_processes"
        raise InputError(f"{message} {num_ranks}, or restart the stage", checkpoint=str(newest), ranks=num_ranks)
    stale = tuple(folder for folder in folders if folder not in whole)
    return ResumePlan(newest, checkpoint_step(newest), stale)


def _world_size_of(folder: Path) -> int | None:
    marks = [match for path in folder.iterdir() if (match := _MARK.fullmatch(path.name))]
    for world_size in {int(match[2]) for match in marks}:
        if {int(match[1]) for match in marks if int(match[2]) == world_size} == set(range(world_size)):
            return world_size
    return None


class MetricsCallback(TrainerCallback):
    """Appends every logged step to a JSON-lines file, on rank 0: the step, and TRL's metrics (loss, reward, ...)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drops the lines that a killed process logged after the checkpoint from which this one resumes."""
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= state.global_step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            numbers = {"step": state.global_step} | {name: float(value) for name, value in logs.items()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(numbers) + "\n")


class WholeCheckpointCallback(TrainerCallback):
    """Marks a checkpoint, on each rank, when the rank's part is written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        mark_whole(folder, args.process_index, args.world_size)
