"""The job file of a stage: JSON that the launcher writes and every rank reads; and the result file of a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from weightline.dtypes import DtypeSetting
from weightline.errors import InputError
from weightline.files import write_atomically
from weightline.stages.recipe import ArithmeticConfig, FrozenModel, StageConfig


class StageJob(FrozenModel):
    """One execution of one stage."""

    stage: StageConfig
    """The stage of the recipe to train."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """The built-in data's split: the same one for all stages and the evaluation."""
    model_dir: Path
    """Folder with the weights to start from and the tokenizer."""
    dtype: DtypeSetting = "auto"
    """Dtype of the weights, as `Recipe.dtype` describes it."""
    output_dir: Path
    """Folder of this stage: checkpoint-N/, model/, metrics.jsonl, and done.json, written last."""
    run_id: str
    """Name of the run, written to every version's manifest."""
    seed: int = Field(default=0, ge=0)
    """Seed of data order and sampling."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device on which the ranks compute."""
    resume: bool = True
    """True to resume from the last complete checkpoint in `output_dir`, if any. False: start from `model_dir`."""
    chain_url: str | None = None
    """Bucket and chain to publish versions to. None: train without publishing."""
    step_observer: str | None = None
    """`module:function` that makes an observer of the publish steps, such as one that records them in Prefect."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """Links about the origin of versions, such as their flow run, written to every manifest."""

    @property
    def final_model_dir(self) -> Path:
        """Returns the folder of the stage's last weights."""
        return self.output_dir / "model"

    @property
    def metrics_path(self) -> Path:
        """Returns the file with one JSON object per logged step: step, loss, reward, ... as TRL logs them."""
        return self.output_dir / "metrics.jsonl"

    @property
    def replica_dir(self) -> Path:
        """Returns the state folder of the stage's own replica, with `rollouts: {replicas: local}`."""
        return self.output_dir / "replica"

    @property
    def done_path(self) -> Path:
        """Returns the file that marks completion: a StageResult. It exists only when `final_model_dir` is complete."""
        return self.output_dir / "done.json"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a job file. InputError when it is missing or malformed."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} is not a stage job: {error}", path=str(path)) from error

    def save(self, path: str | Path) -> None:
        """Writes the job file by one rename. Safe to repeat."""
        write_atomically(Path(path), self.model_dump_json(indent=1))


class StageResult(FrozenModel):
    """The result of a finished stage, in `done.json`."""

    kind: str
    """sft, dpo or grpo."""
    run_id: str
    """The job's run_id."""
    global_step: int
    """Number of optimizer steps of this stage."""
    resumed_from_step: int
    """Step of the checkpoint that this process started from; 0 for a fresh start."""
    train_seconds: float
    """Wall time of training in this process."""
    metrics: dict[str, float]
    """The last logged numbers."""

    @classmethod
    def load(cls, job: StageJob) -> Self | None:
        """Returns the result of a finished job; None when it has not finished."""
        try:
            return cls.model_validate_json(job.done_path.read_bytes())
        except FileNotFoundError:
            return None
