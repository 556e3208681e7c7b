"""Publishes versions from the training thread: captures at each sync and hands the changes to a background thread.

Every decision depends only on numbers that all ranks share: how many syncs were captured, and how many are settled on
all ranks (one int64 all-reduce over gloo per sync). So all ranks capture at the same syncs. The training thread blocks
only for the bounds in `PublishSettings`.

Errors follow the policy in `weightline.trainer.group`.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self

from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain
from weightline.chain.read.records import GAPS, write_record
from weightline.codec.coding import coding_named
from weightline.codec.digest import parse_digest
from weightline.errors import CommitConflictError, PublishError
from weightline.format.manifest import AssetRef
from weightline.trainer.anchoring import LateJoiner
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import Failure, RankGroup, attempt, best_effort
from weightline.trainer.model_files import ModelFiles
from weightline.trainer.partition import shards_of
from weightline.trainer.settings import PublishSettings
from weightline.trainer.start import Start, StartPlan, changes_from_tip, decide_start, summed_digests, tensors_and_base
from weightline.trainer.steps import NoObserver, StepObserver
from weightline.trainer.sync import Sync, SyncOutcome, SyncPublisher
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
        """Creates the process groups. Collective. The session closes itself once `is_training` returns False."""
        self.chain, self.settings, self.observer = chain, settings, observer or NoObserver()
        self.group = RankGroup(settings.timeout_seconds)
        self._publisher_group = RankGroup(settings.timeout_seconds)
        self._is_training: Callable[[], bool] | None = is_training
        self._baseline: Baseline
        self._publisher: SyncPublisher
        self._is_started = False
        self._is_closed = False
        self._assets: tuple[AssetRef, ...] = ()
        self._model_files: ModelFiles | None = None
        self._in_flight: deque[Sync] = deque()
        self._num_captured = 0
        self._num_settled = 0
        self._epoch = 0
        self._wants_anchor = False
        self.last_step = -1
        """Training step of the newest capture."""
        self.committed: list[int] = []
        """Versions that this session committed, in order."""
        self.payload_nbytes = 0
        """Bytes of the payloads of these versions, of all ranks."""

    def start(
        self, model: Any, processing_class: Any = None, global_step: int = 0, mark: VersionMark | None = None
    ) -> StartPlan:
        """Compares the loaded weights with the chain, and commits a version before the first step if they differ.

        `mark`: the version that the resumed checkpoint is marked with, if any. Raises BaseMismatchError or StorageError
        on every rank, before the first training step.
        """
        with self._closing_on_error():
            group, ranked = self.group, coding_named(self.settings.coding).ranked
            tensors, base_model = tensors_and_base(model, group)
            specs = {tensor.spec.name: tensor.spec for tensor in tensors}
            shards = group.on_all(lambda: shards_of(tensors, group.rank, group.world_size))
            self._baseline = group.on_all(lambda: Baseline(shards, ranked=ranked))
            loaded = summed_digests(group.on_all(self._baseline.digests), specs, group)
            start: Start = group.on_first(
                lambda: decide_start(
                    self.chain, self.settings, model, processing_class, specs, loaded, base_model, global_step, mark
                )
            )
            writer = group.on_all(lambda: self._writer(start, specs))
            self._publisher = SyncPublisher(writer.write, self._is_training or _ended, self._end_of_thread)
            self._is_training = None
            self._is_started = True
            self._assets = start.assets
            if group.rank == 0:
                self._model_files = ModelFiles(self.chain, model, processing_class)
            if start.plan.action != "continue":
                self._commit_start(start.plan, global_step)
            self.last_step = global_step
            return start.plan

    def _writer(self, start: Start, specs: dict[str, TensorSpec]) -> VersionWriter:
        tip = start.plan.tip
        tip_on_first = tip if self.group.rank == 0 else None
        digests = {} if tip_on_first is None else self.chain.manifest(tip_on_first).digests
        return VersionWriter(
            chain=self.chain, settings=self.settings, session_id=start.session_id, specs=specs,
            baseline=self._baseline, base_model=start.base_model, group=self._publisher_group, observer=self.observer,
            tip=tip, digests={name: parse_digest(digest) for name, digest in digests.items()},
            late_joiner=LateJoiner.of(self.chain, tip_on_first, self.settings.anchor_policy),
        )  # fmt: skip

    def _commit_start(self, plan: StartPlan, global_step: int) -> None:
        found: tuple[Changes, ...] = ()
        if plan.tip is not None:
            tip, ranked = plan.tip, coding_named(self.settings.coding).ranked
            found = self.group.on_all(lambda: changes_from_tip(self.chain, tip, self._baseline, ranked=ranked))
        kind: Literal["anchor", "delta", "revert"] = "anchor" if plan.action == "continue" else plan.action
        self._submit(kind, found, global_step, is_milestone=kind == "anchor", reverts_to=plan.reverts_to)
        self.flush()

    def sync(
        self,
        global_step: int,
        *,
        metrics: dict[str, float] | None = None,
        is_milestone: bool = False,
        must_capture: bool = False,
    ) -> bool:
        """Captures the changes of this rank's partition and hands them to the publisher.

        Returns False when the sync was folded into the next one. A milestone or `must_capture` prevents folding.
        PublishError when an earlier version could not be committed and the policy is `stop`; CommitConflictError when
        another writer committed it.
        """
        with self._closing_on_error():
            self._settle(self.group.minimum(self._publisher.num_outcomes))
            if not self._make_room(must_capture=is_milestone or must_capture):
                return False
            # A rank whose capture fails continues to the next sync, as the others do. The outcome reports the failure
            # to all ranks there.
            captured = attempt(self._baseline.capture)
            failure = captured.reason if isinstance(captured, Failure) else None
            changes = () if isinstance(captured, Failure) else captured
            self._submit(
                "delta", changes, global_step, is_milestone=is_milestone, metrics=metrics or {}, failure=failure
            )
            return True

    def flush(self) -> None:
        """Waits until all captured syncs are settled on every rank. Raises the errors of `sync`."""
        with self._closing_on_error():
            self._publisher.wait_for(self._num_captured)
            self._settle(self.group.minimum(self._publisher.num_outcomes))

    def close(self) -> None:
        """Ends the background thread and the connections to other ranks within `close_seconds`. Safe to repeat.

        Waits up to `close_seconds` for the version that is being written. Ranks that still wait for this one get an
        error.
        """
        self._is_closed = True
        self.group.close()
        if not self._is_started:
            self._publisher_group.close()
        elif not self._publisher.close(self.settings.close_seconds):
            _logger.warning("the version being written was not finished within %g s", self.settings.close_seconds)
        self.observer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        if self._is_closed:
            raise PublishError("this session is closed: training has ended", reason="closed")
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _end_of_thread(self, is_abandoned: bool) -> None:
        """Closes the groups at the end of the publisher's thread, so that no rank waits for this one."""
        self._publisher_group.close()
        if is_abandoned:
            self._is_closed = True
            self.group.close()
            self.observer.close()

    def _submit(
        self,
        kind: Literal["anchor", "delta", "revert"],
        changes: tuple[Changes, ...],
        global_step: int,
        *,
        is_milestone: bool,
        reverts_to: int | None = None,
        metrics: dict[str, float] | None = None,
        failure: str | None = None,
    ) -> None:
        if kind == "delta" and self._model_files is not None:
            self._assets = self._model_files.changed() or self._assets
        sync = Sync(
            self._num_captured, self._epoch, global_step, kind, changes, reverts_to, is_milestone, metrics or {},
            self._assets, with_anchor=self._wants_anchor and kind == "delta", failure=failure,
        )  # fmt: skip
        self._assets = ()
        self._wants_anchor = False
        self._num_captured += 1
        self._in_flight.append(sync)
        self._publisher.submit(sync)
        self.last_step = global_step

    def _make_room(self, *, must_capture: bool) -> bool:
        # An anchor is read from the baseline, which a capture would change. So no sync may follow one with an anchor.
        limit = 1 if any(sync.with_anchor for sync in self._in_flight) else self.settings.max_in_flight
        if len(self._in_flight) < limit:
            return True
        if self.settings.on_backlog == "fold" and not must_capture:
            return False
        self._publisher.wait_for(self._num_captured - limit + 1)
        self._settle(self.group.minimum(self._publisher.num_outcomes))
        return True

    def _settle(self, num_settled: int) -> None:
        """Processes outcomes that every rank has. After a failure, rewinds the baseline over all syncs in flight."""
        for sequence in range(self._num_settled, num_settled):
            outcome = self._publisher.outcome(sequence)
            self._num_settled = sequence + 1
            if outcome.status == "committed":
                self._in_flight.popleft()
                is_under_way = any(sync.with_anchor for sync in self._in_flight)
                self._wants_anchor = outcome.wants_anchor and not is_under_way
                self.committed.append(outcome.version)
                self.payload_nbytes += outcome.payload_nbytes
            elif outcome.status == "failed":
                self._handle_failure(outcome)

    def _handle_failure(self, outcome: SyncOutcome) -> None:
        failed = self._in_flight[0]
        if outcome.is_conflict:
            raise CommitConflictError(outcome.reason, version=outcome.version)
        if self.settings.on_publish_error == "stop":
            raise PublishError(
                f"version {outcome.version} (step {failed.global_step}) could not be committed: {outcome.reason}. "
                "Fix the cause and run again: training resumes from its last checkpoint",
                version=outcome.version,
                reason=outcome.reason,
            )
        for sync in reversed(self._in_flight):
            self._baseline.rewind(sync.changes)
        self._assets = next((s.assets for s in self._in_flight if s.assets), ())
        self._in_flight.clear()
        self._epoch += 1
        if self.group.rank == 0:
            # Best effort: the bucket may be the cause of the failure.
            best_effort(f"recording that version {outcome.version} was skipped", lambda: self._record(outcome, failed))

    def _record(self, outcome: SyncOutcome, failed: Sync) -> None:
        record = {"status": "skipped", "reason": outcome.reason, "global_step": failed.global_step}
        write_record(self.chain, GAPS, outcome.version, f"step-{failed.global_step}", record)


def _ended() -> bool:
    return False
