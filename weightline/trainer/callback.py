"""A callback that commits the weights of a Hugging Face Trainer as versions of a chain.

    trainer.add_callback(WeightlineCallback("file:///data/bucket/my-model"))

Works with TRL's and transformers' trainers under DeepSpeed ZeRO-3, FSDP2 and plain data parallelism. Needs no Prefect.
"""

from __future__ import annotations

import logging
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import open_chain
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.errors import InputError
from weightline.extras import requires
from weightline.trainer.settings import OnBacklog, OnPublishError, PublishSettings

with requires("train"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from weightline.trainer.group import best_effort
    from weightline.trainer.model_files import processing_class_of
    from weightline.trainer.session import PublishSession
    from weightline.trainer.steps import load_observer

_logger = logging.getLogger(__name__)
#: The module of transformers' training loop.
_TRAINER_MODULE = "transformers.trainer"


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
            max_in_flight=max_in_flight, on_backlog=on_backlog, on_publish_error=on_publish_error,
            anchor_policy=anchor_policy or AnchorPolicy(), timeout_seconds=timeout_seconds,
            close_seconds=close_seconds, provenance=dict(provenance or {}), step_observer=step_observer,
        )  # fmt: skip
        self.session: PublishSession | None = None
        self._metrics: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Compares the loaded weights with the chain and commits a version if they differ. Collective."""
        self.close()
        observer = load_observer(self.settings.step_observer)
        self.session = PublishSession(self.chain, self.settings, observer, _still_training())
        mark = _resumed_mark(args, state) if state.is_world_process_zero else None
        plan = self.session.start(model, processing_class_of(kwargs), state.global_step, mark)
        if state.is_world_process_zero:
            found = "which is empty" if plan.tip is None else f"from version {plan.tip}"
            _say(
                f"weightline: run {self.settings.run_id} commits to {self.chain.url} ({found}), "
                f"every {self.settings.sync_steps} optimizer steps"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publishes after an optimizer step when one is due. Runs before any checkpoint is saved. Collective."""
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if is_last or control.should_save or state.global_step % self.settings.sync_steps == 0:
            self._sync(state, is_milestone=is_last, must_settle=control.should_save)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publishes before a checkpoint of save strategy `epoch`, which is decided here. Collective."""
        if control.should_save:
            self._sync(state, is_milestone=False, must_settle=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Keeps the newest metrics for the next manifest."""
        self._metrics = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Marks the checkpoint with the version that it holds. Best effort."""
        session = self._session()
        folder = _checkpoint_folder(args, state)
        if state.is_world_process_zero and folder.is_dir() and session.last_step == state.global_step:
            best_effort(f"marking {folder}", lambda: VersionMark.of(self.chain, self.chain.tip()).write(folder))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Commits the last state as a milestone, waits for all versions, and ends publishing. Collective."""
        session = self._session()
        if session.last_step != state.global_step:
            session.sync(state.global_step, metrics=self._metrics, is_milestone=True)
        session.flush()
        session.close()
        if state.is_world_process_zero:
            _say(_summary(session))

    def close(self) -> None:
        """Ends publishing. Safe to repeat. After an error in training this happens by itself, a second or two later."""
        if self.session is not None:
            self.session.close()

    def _sync(self, state: TrainerState, *, is_milestone: bool, must_settle: bool) -> None:
        session = self._session()
        if session.last_step != state.global_step:
            session.sync(state.global_step, metrics=self._metrics, is_milestone=is_milestone, must_capture=must_settle)
        if must_settle:
            session.flush()

    def _session(self) -> PublishSession:
        if self.session is None:
            raise InputError("the trainer did not call on_train_begin: add the callback before trainer.train()")
        return self.session


class _CallWatch:
    """Detects that a call under way on this thread has ended, with a result or with an error.

    transformers does not notify callbacks of errors. The callback cannot wrap `train`, since it never gets the trainer,
    and a finalizer would run late, since an exception keeps the frames that it passed. So this inspects the stack of
    the training thread.
    """

    def __init__(self, frame: FrameType) -> None:
        self._frame: FrameType | None = frame
        self._thread_id = threading.get_ident()

    def __call__(self) -> bool:
        """Returns whether the call is still under way. May be called from any thread."""
        frame = sys._current_frames().get(self._thread_id)
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def _always() -> bool:
    return True


def _still_training() -> Callable[[], bool]:
    """Returns a function that says whether the training loop still runs; for other trainers it always returns True."""
    frame = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != _TRAINER_MODULE:
        frame = frame.f_back  # type: ignore[assignment]
    return _always if frame is None else _CallWatch(frame)


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
