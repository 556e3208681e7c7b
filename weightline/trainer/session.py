"""Publishes versions from the training thread: captures at each sync and hands the changes to a background thread.

All ranks capture at the same syncs (see `weightline.trainer.pipeline`). The training thread blocks only for the bounds
in `PublishSettings`.

Errors follow the policy in `weightline.trainer.group`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain
from weightline.chain.read.records import LOGGED, Record, write_record
from weightline.codec.coding import coding_named
from weightline.errors import PublishError
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.trainer.anchoring import LateJoiner
from weightline.trainer.baseline import Baseline
from weightline.trainer.earlier import Trail, finish_left_sessions, forget, leave_trail, register, unfinished_trail
from weightline.trainer.group import Failure, RankGroup, attempt, best_effort
from weightline.trainer.located import LocatedTensors
from weightline.trainer.metrics import MetricsLog, numbers_in
from weightline.trainer.model_files import ModelFiles
from weightline.trainer.partition import shards_of
from weightline.trainer.pipeline import SyncPipeline
from weightline.trainer.published_dtype import decide_rule, describe_cast, main_dtype
from weightline.trainer.settings import PublishSettings
from weightline.trainer.start import (
    Start,
    StartPlan,
    changes_from_tip,
    decide_start,
    specs_of,
    summed_digests,
    tensors_and_base,
)
from weightline.trainer.steps import NoObserver, StepObserver
from weightline.trainer.sync import SyncPublisher
from weightline.trainer.writer import VersionWriter
from weightline.types import Changes, TensorSpec

_logger = logging.getLogger(__name__)


class PublishSession:
    """Publishes the versions of one training process.

    All methods but `close` are collective and are called from the training thread. As a context manager it closes
    itself. A method that raises any error closes the session first.
    """

    def __init__(
        self,
        chain: Chain,
        settings: PublishSettings,
        observer: StepObserver | None = None,
        is_training: Callable[[], bool] = lambda: True,
    ) -> None:
        """Creates the process groups. Collective. The session closes itself once `is_training` returns False.

        Finishes the sessions of this process whose training has ended first.
        """
        finish_left_sessions()
        self.chain, self.settings, self.observer = chain, settings, observer or NoObserver()
        self.group = RankGroup(settings.timeout_seconds)
        self._publisher_group = RankGroup(settings.timeout_seconds)
        self._is_training: Callable[[], bool] | None = is_training
        self._located: LocatedTensors
        self._baseline: Baseline
        self._publisher: SyncPublisher
        self._pipeline: SyncPipeline
        self._is_started = False
        self._is_closed = False
        self._model_files: ModelFiles | None = None
        self._present_model: Callable[[], Any]
        self._metrics = MetricsLog()
        self._num_records = 0
        self._notes: list[tuple[str, str, Record]] = []
        self._listeners: list[Callable[[int, str], object]] = []
        self._trail = Trail(chain.url, "", None)
        self.last_step = -1
        """Training step of the newest capture."""
        self.cast_note: str | None = None
        """Which weights are published in another dtype than training holds them in, where there are such."""
        self.start_version = -1
        """The version that training began at: what `start` committed, or the tip that it found."""
        self.stands_for: int | None = None
        """The version whose weights that one restores, if it is a revert."""
        register(self)

    def start(
        self,
        model: Any,
        processing_class: Any = None,
        global_step: int = 0,
        mark: VersionMark | None = None,
        mixed_precision: str | None = None,
        present_model: Callable[[], Any] | None = None,
    ) -> StartPlan:
        """Compares the loaded weights with the chain, and commits a version before the first step if they differ.

        `mark`: the version that the resumed checkpoint is marked with, if any. `mixed_precision`: accelerate's name of
        the dtype in which training computes (bf16, fp16), which `dtype="auto"` needs. `present_model` returns the model
        to publish later, for trainers that may come to hold another object; default: always `model`. Raises
        BaseMismatchError or StorageError on every rank, before the first training step.
        """
        with self._closing_on_error():
            group, ranked = self.group, coding_named(self.settings.coding).ranked
            rule = group.on_first(lambda: decide_rule(self.settings.dtype, model, mixed_precision, self.chain))
            self._located, base_model = tensors_and_base(model, group, rule)
            tensors = self._located.tensors
            specs = group.on_all(lambda: specs_of(tensors))
            self.cast_note = describe_cast(tensors, rule)
            dtype = main_dtype(specs.values()) if self.cast_note else None
            shards = group.on_all(lambda: shards_of(tensors, group.rank, group.world_size))
            self._baseline = group.on_all(lambda: Baseline(shards, ranked=ranked))
            loaded = summed_digests(group.on_all(self._baseline.digests), specs, group)
            start: Start = group.on_first(
                lambda: decide_start(
                    self.chain, self.settings, model, processing_class, specs, loaded, base_model, global_step, mark,
                    unfinished_trail(model), dtype,
                )
            )  # fmt: skip
            self._trail = Trail(self.chain.url, start.session_id, start.tip.commit_id if start.tip else None)
            leave_trail(model, self._trail)
            writer = group.on_all(lambda: self._writer(start, specs))
            self._publisher = SyncPublisher(
                writer.write, self._is_training or _ended, self._end_of_thread, awaits_metrics=group.rank == 0
            )
            self._is_training = None
            self._present_model = present_model or (lambda: model)
            self._is_started = True
            self._pipeline = SyncPipeline(
                self.chain, self.settings, group, self._publisher, self._baseline, start.tip,
                is_milestone=start.is_milestone,
            )  # fmt: skip
            self._pipeline.assets = start.assets if start.has_new_assets else ()
            if group.rank == 0:
                self._model_files = ModelFiles(self.chain, model, processing_class, dtype)
            if start.plan.action != "continue":
                self._commit_start(start.plan, global_step)
            self.start_version, self.stands_for = self._pipeline.present_version, start.plan.reverts_to
            self.last_step = global_step
            self._metrics.stand_at(global_step)
            return start.plan

    def _writer(self, start: Start, specs: dict[str, TensorSpec]) -> VersionWriter:
        tip = start.plan.tip
        tip_on_first = tip if self.group.rank == 0 else None
        layout = Layout.of(specs.values())
        digests = StateDigests.zeros(layout) if tip_on_first is None else self.chain.digests(tip_on_first)
        return VersionWriter(
            chain=self.chain, settings=self.settings, session_id=start.session_id, layout=digests.layout,
            baseline=self._baseline, base_model=start.base_model, assets=start.assets, group=self._publisher_group,
            observer=self.observer, tip=tip, digests=digests,
            late_joiner=LateJoiner.of(self.chain, tip_on_first, self.settings.anchor_policy),
            on_committed=self._tell_committed,
        )  # fmt: skip

    def _commit_start(self, plan: StartPlan, global_step: int) -> None:
        found: tuple[Changes, ...] = ()
        if plan.tip is not None:
            tip, ranked = plan.tip, coding_named(self.settings.coding).ranked
            found = self.group.on_all(lambda: changes_from_tip(self.chain, tip, self._baseline, ranked=ranked))
        kind: Literal["anchor", "delta", "revert"] = "anchor" if plan.action == "continue" else plan.action
        is_anchor = kind == "anchor"
        self._submit(kind, found, global_step, is_milestone=is_anchor, reverts_to=plan.reverts_to, at_start=True)
        self.flush()

    def sync(
        self,
        global_step: int,
        *,
        metrics: Mapping[str, float] | None = None,
        is_milestone: bool = False,
        must_capture: bool = False,
        awaits_log: bool = False,
    ) -> bool:
        """Captures the changes of this rank's partition and hands them to the publisher.

        The commit waits for the numbers of the step (`log`) when `awaits_log` is set, at the latest until the next call
        of any method.

        Returns False when the sync was folded into the next one. A milestone or `must_capture` prevents folding.
        PublishError when an earlier version could not be committed and the policy is `stop`; CommitConflictError when
        another writer committed it.
        """
        with self._closing_on_error():
            self._metrics.finish()
            if not self._pipeline.make_room(must_capture=is_milestone or must_capture):
                return False
            changes, failure = self._capture()
            self._submit(
                "delta", changes, global_step, is_milestone=is_milestone, metrics=metrics, failure=failure,
                awaits_log=awaits_log,
            )  # fmt: skip
            return True

    def settle(self, global_step: int, *, is_milestone: bool = False, carries_log: bool = True) -> VersionMark | None:
        """Commits the present weights, unless the newest version holds them, and waits until the commit is done.

        `is_milestone` asks for a newest version that is a milestone: an empty one is committed if it is none.
        `carries_log` says that what was logged for this step is of these weights.

        Returns the version that holds the weights, or None when it could not be committed and the policy is
        `skip_and_record`. Raises the errors of `sync`.
        """
        with self._closing_on_error():
            self.flush()
            if not carries_log:
                self._metrics.drop()
            changes, failure = self._capture()
            self._look_at_files()
            has_changed = self.group.minimum(0 if changes or failure or self._pipeline.assets else 1) == 0
            if not has_changed and (self._pipeline.is_milestone or not is_milestone):
                return self._pipeline.settled
            self._submit("delta", changes, global_step, is_milestone=is_milestone, failure=failure)
            self.flush()
            is_committed = self._pipeline.version_of(self._pipeline.num_captured - 1) is not None
            return self._pipeline.settled if is_committed else None

    def flush(self) -> None:
        """Waits until all captured syncs are settled on every rank. Raises the errors of `sync`."""
        with self._closing_on_error():
            self._metrics.finish()
            self._pipeline.flush()

    def log(self, global_step: int, logs: Mapping[str, Any]) -> None:
        """Takes numbers that training logged for a step. Not collective.

        The version of that step carries them. Where it is committed already, they become a record beside it. That also
        holds after the end of training, as for an evaluation of the last step; the record is then written at once.
        """
        numbers = numbers_in(logs)
        if self._metrics.add(global_step, numbers) or self.group.rank != 0 or not numbers:
            return
        self._num_records += 1
        name = f"step-{global_step}-{self._trail.session_id[:8]}-{self._num_records}"
        record = {
            "status": "done", "global_step": global_step, "metrics": numbers,
            "run_id": self.settings.run_id, "stage": self.settings.stage,
        }  # fmt: skip
        record_them = self._recording(self._pipeline.num_captured - 1, LOGGED, name, record)
        if self._is_closed:
            record_them()
        else:
            self._publisher.call(record_them)

    def note(self, kind: str, name: str, record: Record) -> None:
        """Takes a record of the present weights. It is written beside the version that they become. Not collective."""
        if self.group.rank == 0:
            self._notes.append((kind, name, record))

    def on_committed(self, listener: Callable[[int, str], object]) -> None:
        """Calls `listener` with version and commit_id of every version that this session commits from now on.

        On rank 0, on the publisher's thread, as soon as the version exists: the listener must return at once. An error
        of it is logged. Call it before `start` for the version that training starts with.
        """
        self._listeners.append(listener)

    def _tell_committed(self, version: int, commit_id: str) -> None:
        for listener in self._listeners:
            best_effort(f"telling of version {version}", partial(listener, version, commit_id))

    def _recording(self, sequence: int, kind: str, name: str, record: Record) -> Callable[[], None]:
        """Returns a function that writes a record beside the version that a sync became, if it became one."""

        def write() -> None:
            version = self._pipeline.version_of(sequence)
            if version is not None:
                write_record(self.chain, kind, version, name, record)

        return lambda: best_effort(f"writing the record {kind}/{name}", write)

    def wait(self) -> None:
        """Waits until everything captured is committed, as far as this rank sees. Not collective. Errors as in `sync`.

        All ranks see the same outcomes, but not at the same time.
        """
        with self._closing_on_error():
            self._metrics.finish()
            self._pipeline.wait()

    @property
    def present_version(self) -> int:
        """The version that holds the weights of the newest sync, committed or under way. The same on every rank.

        Exact with the policies `wait` and `stop`, which make a version of every sync.
        """
        return self._pipeline.present_version

    @property
    def committed(self) -> tuple[int, ...]:
        """Versions that this session committed, in order."""
        return tuple(self._pipeline.committed) if self._is_started else ()

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the payloads of these versions, of all ranks."""
        return self._pipeline.payload_nbytes if self._is_started else 0

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be published any more."""
        return self._is_closed

    @property
    def is_left(self) -> bool:
        """Whether training has ended without closing the session, as an error does."""
        is_training = self._publisher.is_training if self._is_started else (self._is_training or _ended)()
        return not self._is_closed and not is_training

    def finish(self) -> None:
        """Closes a session whose training has ended without its end, when what was captured is committed.

        Not collective. PublishError when that takes longer than `timeout_seconds`.
        """
        limit = self.settings.timeout_seconds
        if not self._close(limit):
            raise PublishError(
                f"the training before this one still writes a version of {self.chain.url} after {limit:g} s: look "
                "after the bucket and train again",
                reason="timeout",
            )

    def close(self, *, is_complete: bool = True) -> None:
        """Ends the background thread and the connections to other ranks within `close_seconds`. Safe to repeat.

        Waits up to `close_seconds` for the version that is being written. Ranks that still wait for this one get an
        error. `is_complete` says that training came to its end: a later one of this process does not go on from it.
        """
        self._trail.is_complete |= is_complete and not self._is_closed
        self._close_in_time()

    def _close_in_time(self) -> None:
        if not self._close(self.settings.close_seconds):
            _logger.warning("the version being written was not finished within %g s", self.settings.close_seconds)

    def _close(self, limit_seconds: float) -> bool:
        """Returns whether all that was captured is settled."""
        self._is_closed = True
        forget(self)
        self._metrics.finish()
        self.group.close()
        is_finished = True
        if not self._is_started:
            self._publisher_group.close()
        else:
            is_finished = self._publisher.close(limit_seconds)
        self.observer.close()
        return is_finished

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._close_in_time()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        if self._is_closed:
            raise PublishError("this session is closed: training has ended", reason="closed")
        try:
            yield
        except BaseException:
            self._close_in_time()
            raise

    def _end_of_thread(self, is_abandoned: bool) -> None:
        """Closes the groups at the end of the publisher's thread, so that no rank waits for this one."""
        self._publisher_group.close()
        if is_abandoned:
            self._is_closed = True
            forget(self)
            self.group.close()
            self.observer.close()

    def _capture(self) -> tuple[tuple[Changes, ...], str | None]:
        """Returns what changed on this rank, or why it could not be captured.

        A rank that fails goes on to the next collective, as the others do: there all of them hear of it.
        """
        captured = attempt(self._capture_located)
        return ((), captured.reason) if isinstance(captured, Failure) else (captured, None)

    def _capture_located(self) -> tuple[Changes, ...]:
        tensors = self._located.relocate(self._present_model())
        if tensors is not None:
            self._baseline.shards = shards_of(tensors, self.group.rank, self.group.world_size)
        return self._baseline.capture()

    def _look_at_files(self) -> None:
        """Takes note of small files that have changed since the last version. Only rank 0 has any."""
        if self._model_files is not None:
            self._pipeline.assets = self._model_files.changed(self._present_model()) or self._pipeline.assets

    def _submit(
        self,
        kind: Literal["anchor", "delta", "revert"],
        changes: tuple[Changes, ...],
        global_step: int,
        *,
        is_milestone: bool,
        reverts_to: int | None = None,
        metrics: Mapping[str, float] | None = None,
        failure: str | None = None,
        awaits_log: bool = False,
        at_start: bool = False,
    ) -> None:
        if kind == "delta":
            self._look_at_files()
        own_metrics = self._metrics.take(global_step, metrics or {}, awaits_more=awaits_log)
        self._pipeline.submit(
            kind, changes, global_step, own_metrics, is_milestone=is_milestone, reverts_to=reverts_to, failure=failure,
            at_start=at_start,
        )  # fmt: skip
        for note in self._notes:
            self._publisher.call(self._recording(self._pipeline.num_captured - 1, *note))
        self._notes.clear()
        self._trail.num_captured = self._pipeline.num_captured
        self.last_step = global_step


def _ended() -> bool:
    return False
