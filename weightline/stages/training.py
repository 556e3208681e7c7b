"""Trains one stage on one rank with TRL: SFT, DPO or GRPO. Started by weightline.stages.rank.

A stage ends in this order: last checkpoint, final weights in model/, done.json. After a crash before done.json, the
stage resumes from its last complete checkpoint; with done.json the stage is finished.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
import trl
from transformers import AutoTokenizer, Trainer, TrainingArguments

from weightline.errors import InputError
from weightline.files import write_atomically
from weightline.serving.engines.float32 import compute_in_float32
from weightline.serving.http.auth import load_token
from weightline.serving.http.client import wait_for_address
from weightline.stages.checkpoints import MetricsCallback, ResumePlan, WholeCheckpointCallback, plan_resume
from weightline.stages.cpu import use_one_core_without_compiler
from weightline.stages.data import load_reward, load_stage_dataset
from weightline.stages.job import StageJob, StageResult
from weightline.stages.rank import RankExit
from weightline.stages.recipe import RolloutsConfig
from weightline.stages.rollout_state import GenerationStateCallback
from weightline.stages.start_dtype import restore_float32, training_dtype
from weightline.trainer.adapter import is_peft_model

_logger = logging.getLogger(__name__)
Args = TypeVar("Args", bound=TrainingArguments)
#: Created on import, so that its handler runs after those that are registered later, as publishing may do.
_EXIT = RankExit()


def main() -> None:
    """Trains the stage that the job file on the command line names."""
    job = start_rank()
    run_stage(make_trainer(job), job)


def start_rank() -> StageJob:
    """Reads the job from the command line and configures this process. A rank program calls this first."""
    parser = argparse.ArgumentParser(description="One rank of a training stage; started by accelerate launch.")
    parser.add_argument("--job", required=True, type=Path, help="job file (weightline.stages.job.StageJob)")
    job = StageJob.load(parser.parse_args().job)
    if job.device == "cpu":
        use_one_core_without_compiler()
    return job


def make_trainer(job: StageJob, **options: Any) -> Trainer:
    """Returns TRL's trainer of the stage's kind, with the job's model, data and arguments. `options` are for TRL."""
    kind = job.stage.kind
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    if kind == "grpo":
        options["reward_funcs"] = load_reward(job)
    trainer_class, config_class = (getattr(trl, f"{kind.upper()}{part}") for part in ("Trainer", "Config"))
    trainer: Trainer = trainer_class(
        model=str(job.model_dir),
        args=training_args(config_class, job),
        train_dataset=load_stage_dataset(job, tokenizer),
        processing_class=tokenizer,
        **options,
    )
    _keep_float32(trainer, job)
    if job.stage.rollouts is not None:
        _attach_rollouts(trainer, job, job.stage.rollouts)
    return trainer


def _attach_rollouts(trainer: Trainer, job: StageJob, config: RolloutsConfig) -> None:
    """Lets replicas make the completions. Waits for the address of the one that the stage starts, if it does."""
    from weightline.stages.chain_rollouts import ChainRollouts

    if job.chain_url is None:
        raise InputError("rollouts come from replicas of a chain, and this job names none", field="chain_url")
    replicas: str | tuple[str, ...] = config.replicas
    tokens = None
    if replicas == "local":
        url = wait_for_address(job.replica_dir, config.deadline_seconds)
        replicas, tokens = (url,), {url: load_token(job.replica_dir)}
    ChainRollouts(
        job.chain_url, staleness=config.staleness, lookahead=config.lookahead, replicas=replicas, mixing=config.mixing,
        deadline_seconds=config.deadline_seconds, rollout=config.rollout,
        tokens=tokens,
    ).attach(trainer)  # fmt: skip


def _keep_float32(trainer: Trainer, job: StageJob) -> None:
    """What the start model holds in float32 and ZeRO-3 does not train stays float32."""
    model = trainer.model
    found = restore_float32(model.get_base_model() if is_peft_model(model) else model, job.model_dir)
    if trainer.args.process_index == 0:
        if found.restored:
            _logger.info("kept in float32, as the start model holds them: %s", ", ".join(found.restored))
        if found.rounded:
            _logger.warning(
                "the start model holds %d tensors in float32 that are trained in bf16: %s. To train all weights in "
                "float32, set `dtype: float32` in the recipe",
                len(found.rounded), ", ".join(found.rounded[:5]),
            )  # fmt: skip
        if not trainer.args.bf16 and job.dtype in ("auto", "held"):
            _logger.warning(
                "the start model is not bf16: training computes in float32, which rounds nothing. To train in bf16, "
                "set `dtype: bfloat16` in the recipe"
            )


def training_args(config_class: type[Args], job: StageJob) -> Args:
    """Returns the stage's TRL configuration: the job's settings, then the recipe's `trainer_args`, then defaults."""
    stage = job.stage
    passed: dict[str, Any] = {
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_total_limit": 2,
        "run_name": f"{job.run_id}-{stage.kind}",
        "dataloader_pin_memory": job.device == "cuda",
        **stage.trainer_args,
    }
    dtype = training_dtype(job.dtype, job.model_dir)
    return config_class(
        **passed
        | {"model_init_kwargs": {"dtype": str(dtype).removeprefix("torch.")} | passed.get("model_init_kwargs", {})},
        output_dir=str(job.output_dir),
        max_steps=stage.max_steps,
        learning_rate=stage.learning_rate,
        per_device_train_batch_size=stage.per_device_batch_size,
        save_strategy="steps",
        save_steps=stage.save_steps,
        seed=job.seed,
        data_seed=job.seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=job.device == "cpu",
    )


def run_stage(trainer: Trainer, job: StageJob) -> None:
    """Trains, saves the last weights, and marks the stage as done. Safe to repeat; see the module's docstring.

    A stage that is killed and repeated gives the same bits as one that was not. The exception is one with
    `sync_ref_model`, since no trainer saves the moving reference.
    """
    if not (job.resume and job.done_path.exists()):
        _train(trainer, job)
    trainer.accelerator.end_training()
    _EXIT.declare_finished()


def _train(trainer: Trainer, job: StageJob) -> None:
    args = trainer.args
    plan = plan_resume(job, args.world_size)
    if args.process_index == 0:
        _remove(plan.stale)
    if job.device == "cpu":
        for model in (trainer.model, getattr(trainer, "ref_model", None)):
            if model is not None:
                compute_in_float32(model)
    _add_callbacks(trainer, job)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(plan.checkpoint) if plan.checkpoint else None)
    train_seconds = time.monotonic() - started
    trainer.save_model(str(job.final_model_dir))
    trainer.accelerator.wait_for_everyone()
    if args.process_index == 0:
        write_atomically(job.done_path, _result(trainer, job, plan, train_seconds).model_dump_json(indent=1))
    trainer.accelerator.wait_for_everyone()


def _add_callbacks(trainer: Trainer, job: StageJob) -> None:
    """Adds the callbacks. The checkpoint mark comes last, since it also covers the files of the other callbacks."""
    if job.chain_url is not None:
        from weightline.trainer.callback import WeightlineCallback

        callback = WeightlineCallback(
            job.chain_url, stage=job.stage.kind, run_id=job.run_id, sync_steps=job.stage.sync_steps,
            dtype=job.dtype,
            provenance=job.provenance, step_observer=job.step_observer,
        )  # fmt: skip
        trainer.add_callback(callback)
    trainer.add_callback(MetricsCallback(job.metrics_path))
    if job.stage.kind == "grpo" and job.stage.rollouts is None:
        trainer.add_callback(GenerationStateCallback(trainer))
    trainer.add_callback(WholeCheckpointCallback())


def _remove(paths: tuple[Path, ...]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _result(trainer: Trainer, job: StageJob, plan: ResumePlan, train_seconds: float) -> StageResult:
    numbers = [entry for entry in trainer.state.log_history if "loss" in entry]
    return StageResult(
        kind=job.stage.kind,
        run_id=job.run_id,
        global_step=trainer.state.global_step,
        resumed_from_step=plan.global_step,
        train_seconds=train_seconds,
        metrics={name: float(value) for name, value in (numbers[-1] if numbers else {}).items()},
    )
