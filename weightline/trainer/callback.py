"""The one line that makes every sync of a Hugging Face Trainer a committed version.

    trainer.add_callback(WeightlineCallback("file:///data/bucket/my-model"))

Works with TRL's and transformers' trainers under DeepSpeed ZeRO-3 and plain data parallelism. Needs no Prefect.
"""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

from weightline.chain.files.checkpoint import MARKER
from weightline.chain.read.history import open_chain
from weightline.errors import InputError
from weightline.extras import requires

with requires("train"):
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    from weightline.trainer.session import PublishSession, PublishSettings
    from weightline.trainer.steps import load_observer


class WeightlineCallback(TrainerCallback):
    """Publishes a version every `sync_steps` optimizer steps, before every checkpoint, and at the end of training.

    chain_url: the bucket and chain, as in file:///data/bucket/my-model.
    settings: the fields of `PublishSettings`, as in sync_steps=10, stage="sft".

    Every checkpoint's weights are a version before the checkpoint exists, so a resumed run finds them in the chain.
    The training result is bit-identical with and without this callback.
    Raises BaseMismatchError or StorageError at the start, PublishError or CommitConflictError at a sync.
    """

    def __init__(self, chain_url: str, **settings: Any) -> None:
        self.chain = open_chain(chain_url)
        self.settings = PublishSettings(**{"run_id": f"run-{secrets.token_hex(4)}", **settings})
        self.session: PublishSession | None = None
        self._metrics: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """All ranks: compare the loaded weights with the chain and commit what is missing."""
        self.session = PublishSession(self.chain, self.settings, load_observer(self.settings.step_observer))
        self.session.start(model, kwargs.get("processing_class"), state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All ranks, after the optimizer step: the partition holds the new weights, no checkpoint is saved yet."""
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if is_last or control.should_save or state.global_step % self.settings.sync_steps == 0:
            self._sync(state, is_milestone=is_last, must_settle=control.should_save)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save strategy `epoch` decides here: its checkpoint's weights are committed first as well."""
        if control.should_save:
            self._sync(state, is_milestone=False, must_settle=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remember the newest numbers for the next manifest."""
        self._metrics = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Say in the checkpoint which version it is."""
        session = self._session()
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and session.last_step == state.global_step:
            marker = {"chain": self.chain.url, "version": self.chain.tip_version(), "run_id": self.settings.run_id}
            (folder / MARKER).write_text(json.dumps(marker))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Settle everything; the last state is a milestone."""
        session = self._session()
        if session.last_step != state.global_step:
            session.sync(state.global_step, metrics=self._metrics, is_milestone=True)
        session.flush()
        session.close()

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
