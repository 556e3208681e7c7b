"""A callback that commits the weights of a Hugging Face Trainer as versions of a chain.

    trainer.add_callback(WeightlineCallback("file:///data/bucket/my-model"))

Works with TRL's and transformers' trainers under DeepSpeed ZeRO-3, FSDP2 and plain data parallelism. Needs no Prefect.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import open_chain
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.dtypes import DtypeSetting
from weightline.errors import InputError
from weightline.extras import requires
from weightline.trainer.settings import OnBacklog, OnPublishError, PublishSettings

with requires("train"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from weightline.trainer.group import best_effort
    from weightline.trainer.model_files import processing_class_of
    from weightline.trainer.seat import Seat, still_training
    from weightline.trainer.session import PublishSession
    from weightline.trainer.steps import load_observer

_logger = logging.getLogger(__name__)


class WeightlineCallback(TrainerCallback):
    """Publishes a version every `sync_steps` optimizer steps, before every checkpoint, and at the end of training.

    Every checkpoint's weights are committed before the checkpoint is saved, so a resumed run finds them in the chain.
    The training result is bit-identical with and without this callback. It logs the chain at the start of training, and
    the committed versions at the end.

    Raises BaseMismatchError or StorageError at the start of training, PublishError or CommitConflictError at a sync, on
    every rank. When training ends with any error, publishing ends within seconds.
    """

    def __init__(
        self,
        chain_url: str,
        *,
        stage: str = "train",
        run_id: str | None = None,
        sync_steps: int = 1,
        coding: str = "gap-by-magnitude",
        dtype: DtypeSetting = "auto",
        max_in_flight: int = 2,
        on_backlog: OnBacklog = "wait",
        on_publish_error: OnPublishError = "stop",
        anchor_policy: AnchorPolicy | None = None,
        timeout_seconds: float = 1800.0,
        close_seconds: float = 60.0,
        provenance: Mapping[str, str] | None = None,
        step_observer: str | None = None,
    ) -> None:
        """Opens the chain and checks the settings. Writes nothing before training begins.

        Args:
            chain_url: Bucket and chain, as in file:///data/bucket/my-model or s3://bucket/my-model.
            stage: Label of every version, such as sft, dpo or grpo. Default: train.
            run_id: Name of the run in every manifest. Default: run- and eight random hexadecimal digits. Pass the same
                name when a run resumes.
            sync_steps: Optimizer steps between two versions. Default: 1.
            coding: How payloads are coded: gap-by-magnitude (the default, smallest) or gap (fastest).
            dtype: Dtype of the published weights. auto (the default): float32 weights under bf16 or fp16 mixed
                precision in the 16-bit dtype that the model's config names, or else in the one that training computes
                in; everything else as training holds it. held: always as training holds them. bfloat16, float16 or
                float32: that one. Buffers and what the architecture keeps in float32 are never cast.
            max_in_flight: Versions that may be captured and not yet committed; each holds its changes in host memory.
                Default: 2.
            on_backlog: What to do when the bucket is slower than training: wait (the default), or fold the changes
                into the next version.
            on_publish_error: What to do when a version cannot be committed: stop training (the default), or
                skip_and_record: go on, and let the next version span the gap.
            anchor_policy: When a full state is written beside a version, for replicas that join late. Default: when
                replaying deltas would take a replica longer than loading a full state.
            timeout_seconds: How long a rank waits for one that is alive and does not answer. Default: 1800.
            close_seconds: How long the end of training, or an error, waits for the version that is being written.
                Default: 60.
            provenance: Links for people, copied into every manifest, such as the URL of a tracker's run. Default: none.
            step_observer: module:function that makes a `weightline.trainer.steps.StepObserver`. Default: the value of
                the environment variable WEIGHTLINE_STEP_OBSERVER, if set.

        Raises:
            InputError: A setting is invalid, or the URL's scheme is not supported.
        """
        self.chain = open_chain(chain_url)
        self.settings = PublishSettings(
            stage=stage, run_id=run_id or f"run-{secrets.token_hex(4)}", sync_steps=sync_steps, coding=coding,
            dtype=dtype,
            max_in_flight=max_in_flight, on_backlog=on_backlog, on_publish_error=on_publish_error,
            anchor_policy=anchor_policy or AnchorPolicy(), timeout_seconds=timeout_seconds,
            close_seconds=close_seconds, provenance=dict(provenance or {}), step_observer=step_observer,
        )  # fmt: skip
        self.session: PublishSession | None = None
        self._seat: Seat | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Compares the loaded weights with the chain and commits a version if they differ. Collective.

        An earlier training of this process that did not reach its end is finished first.
        """
        seat = Seat(self, WeightlineCallback, self._publish_checkpoint)
        if self.session is not None:
            self.session.finish()
        observer = load_observer(self.settings.step_observer)
        self.session = PublishSession(self.chain, self.settings, observer, still_training())
        mark = _resumed_mark(args, state) if state.is_world_process_zero else None
        plan = self.session.start(
            model, processing_class_of(kwargs), state.global_step, mark, args.mixed_precision, seat.model_watch(model)
        )
        seat.take()
        self._seat = seat
        if state.is_world_process_zero:
            found = "which is empty" if plan.tip is None else f"from version {plan.tip}"
            _say(
                f"weightline: run {self.settings.run_id} commits to {self.chain.url} ({found}), "
                f"every {self.settings.sync_steps} optimizer steps"
            )
            if self.session.cast_note:
                _say(f"weightline: {self.session.cast_note}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publishes after an optimizer step when one is due. Runs before any checkpoint is saved. Collective."""
        session = self._session_after_others()
        if session is None or session.last_step == state.global_step:
            return
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if is_last or control.should_save or state.global_step % self.settings.sync_steps == 0:
            session.sync(
                state.global_step,
                # The best checkpoint's weights are loaded after the last step, and are the milestone then.
                is_milestone=is_last and not args.load_best_model_at_end,
                must_capture=control.should_save or is_last,
                awaits_log=control.should_log,
            )
        if control.should_save and not control.should_log:
            session.flush()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Gives the metrics to the version of their step. Before a checkpoint, waits until that version is committed.

        Not collective, since some trainers log on one rank only.
        """
        if self.session is None or not self._is_last_turn():
            return
        self.session.log(state.global_step, logs or {})
        if control.should_save and not self.session.is_closed:
            self.session.wait()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publishes before a checkpoint that a callback asked for after the step's end. Collective."""
        if self.session is None or self.session.is_closed or not self._is_last_turn():
            return
        if control.should_save and self.session.last_step != state.global_step:
            self.session.settle(state.global_step)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publishes before a checkpoint of save strategy `epoch`, which is decided here. Collective."""
        session = self._session_after_others()
        if session is not None and control.should_save:
            session.settle(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Publishes and marks a checkpoint, unless the herald of the seat called before. Collective."""
        if self._seat is None or not self._seat.has_herald:
            self._publish_checkpoint(args, state, control)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Commits the last state as a milestone, waits for all versions, and ends publishing. Collective."""
        session = self._session_after_others()
        if session is None:
            return
        is_restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        session.settle(state.global_step, is_milestone=True, carries_log=not is_restored)
        session.close()
        if self._seat is not None:
            self._seat.leave()
            self._seat = None
        if state.is_world_process_zero:
            _say(_summary(session))

    def close(self) -> None:
        """Ends publishing. Safe to repeat. After an error in training this happens by itself, a second or two later."""
        if self.session is not None:
            self.session.close(is_complete=False)

    def _publish_checkpoint(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Commits the weights of a saved checkpoint, unless a version holds them, and writes its mark. Collective."""
        mark = self._session().settle(state.global_step)
        folder = _checkpoint_folder(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        if mark is None:
            _logger.warning("%s holds weights that could not be committed: it gets no mark", folder)
        else:
            best_effort(f"marking {folder}", lambda: mark.write(folder))

    def _session_after_others(self) -> PublishSession | None:
        """Returns the session; None when other callbacks follow at this event, and this one is called again after."""
        session = self._session()
        return session if self._is_last_turn() else None

    def _is_last_turn(self) -> bool:
        return self._seat is None or self._seat.is_last_turn()

    def _session(self) -> PublishSession:
        if self.session is None:
            raise InputError("the trainer did not call on_train_begin: add the callback before trainer.train()")
        return self.session


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _resumed_mark(args: TrainingArguments, state: TrainerState) -> VersionMark | None:
    """Returns the mark of the checkpoint that training resumes from; None if it is not in the output folder."""
    return VersionMark.read(_checkpoint_folder(args, state)) if state.global_step > 0 else None


def _summary(session: PublishSession) -> str:
    versions, url = session.committed, session.chain.url
    if not versions:
        return f"weightline: nothing was committed to {url}"
    return (
        f"weightline: committed versions {versions[0]}..{versions[-1]}, {session.payload_nbytes:,} bytes of payloads, "
        f"to {url}"
    )


def _say(line: str) -> None:
    """Logs the line at INFO. Adds a handler when the application configured none, as transformers does."""
    if not _logger.hasHandlers():
        _logger.addHandler(logging.StreamHandler())
        _logger.setLevel(logging.INFO)
    _logger.info("%s", line)
