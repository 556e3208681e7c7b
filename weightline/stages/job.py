"""What one stage process needs to know, as one JSON file: written by the launcher, read by every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from weightline.errors import InputError
from weightline.files import write_atomically
from weightline.stages.recipe import ArithmeticConfig, FrozenModel, StageConfig


class StageJob(FrozenModel):
    """One execution of one stage."""

    stage: StageConfig
    """What to train."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """The built-in data's split: the same one for all stages and the evaluation."""
    model_dir: Path
    """Folder with the weights to start from, in bf16, and the tokenizer."""
    output_dir: Path
    """Folder of this stage: checkpoint-N/, model/, metrics.jsonl, and done.json, written last."""
    run_id: str
    """Names the run; goes into every version's manifest."""
    seed: int = Field(default=0, ge=0)
    """Data order and sampling."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the ranks compute."""
    resume: bool = True
    """Go on from the last complete checkpoint in `output_dir`, when there is one. False: start at `model_dir`."""
    chain_url: str | None = None
    """Bucket and chain to publish versions to. None: train without publishing."""
    step_observer: str | None = None
    """`module:function` that makes an observer of the publish steps, such as one that records them in Prefect."""
    provenance: dict[str, str] = Field(default_factory=dict)
    """What every version's manifest says of where it came from, such as the flow run that made it."""

    @property
    def final_model_dir(self) -> Path:
        """Where the stage saves its last weights."""
        return self.output_dir / "model"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a logged step: step, loss, reward, learning_rate and whatever TRL logs."""
        return self.output_dir / "metrics.jsonl"

    @property
    def done_path(self) -> Path:
        """The completion marker: a StageResult. It exists only when `final_model_dir` is complete."""
        return self.output_dir / "done.json"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a job file. Raises InputError when it is missing or malformed."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} is not a stage job: {error}", path=str(path)) from error

    def save(self, path: str | Path) -> None:
        """Write the job file in one rename. Safe to repeat."""
        write_atomically(Path(path), self.model_dump_json(indent=1))


class StageResult(FrozenModel):
    """What a finished stage says about itself, in `done.json`."""

    kind: str
    """sft, dpo or grpo."""
    run_id: str
    """Of the job."""
    global_step: int
    """Optimizer steps that the weights have seen in this stage."""
    resumed_from_step: int
    """Step of the checkpoint that this process started from; 0 for a fresh start."""
    train_seconds: float
    """Wall time of training in this process."""
    metrics: dict[str, float]
    """The last logged numbers."""

    @classmethod
    def load(cls, job: StageJob) -> Self | None:
        """The result of a finished job, or None when it has not finished."""
        try:
            return cls.model_validate_json(job.done_path.read_bytes())
        except FileNotFoundError:
            return None
