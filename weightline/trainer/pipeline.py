"""The syncs between their capture and their commit: how many there may be, and what becomes of them.

Every decision depends only on numbers that all ranks share: how many syncs were captured, and how many are settled on
all ranks (one int64 all-reduce over gloo per sync). So all ranks capture at the same syncs, and process the same
outcomes at the same sync.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from weightline.chain.files.checkpoint import VersionMark
from weightline.chain.read.history import Chain
from weightline.chain.read.records import GAPS, write_record
from weightline.errors import CommitConflictError, PublishError
from weightline.format.manifest import AssetRef
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import RankGroup, best_effort
from weightline.trainer.metrics import StepMetrics
from weightline.trainer.settings import PublishSettings
from weightline.trainer.sync import Sync, SyncOutcome, SyncPublisher
from weightline.types import Changes


class SyncPipeline:
    """Numbers the syncs, bounds those in flight, and processes their outcomes. For the training thread.

    Methods that are collective say so. Those that process outcomes raise CommitConflictError when another writer
    committed a version, and PublishError when a version could not be committed and the policy is `stop`.
    """

    def __init__(
        self,
        chain: Chain,
        settings: PublishSettings,
        group: RankGroup,
        publisher: SyncPublisher,
        baseline: Baseline,
        tip: VersionMark | None,
        *,
        is_milestone: bool,
    ) -> None:
        """Starts with nothing in flight. `tip` is the version to start from, and `is_milestone` whether it is one."""
        self._chain, self._settings, self._group = chain, settings, group
        self._publisher, self._baseline = publisher, baseline
        self._in_flight: deque[Sync] = deque()
        self._num_settled = 0
        self._epoch = 0
        self._wants_anchor = False
        self.num_captured = 0
        self.assets: tuple[AssetRef, ...] = ()
        """Small files that the next version takes along. Only rank 0 has any."""
        self.settled = tip
        """The newest version that every rank knows to be committed by this session, or the one that it started from."""
        self.is_milestone = is_milestone
        """Whether that version is one."""
        self.committed: list[int] = []
        """Versions that were committed, in order."""
        self.payload_nbytes = 0
        """Bytes of the payloads of these versions, of all ranks."""

    @property
    def present_version(self) -> int:
        """The version that holds the newest captured state, or will; -1 without one. The same on every rank.

        With policies that fold syncs or skip versions it may become another one.
        """
        settled = -1 if self.settled is None else self.settled.version
        return settled + len(self._in_flight)

    def submit(
        self,
        kind: Literal["anchor", "delta", "revert"],
        changes: tuple[Changes, ...],
        global_step: int,
        metrics: StepMetrics,
        *,
        is_milestone: bool,
        reverts_to: int | None = None,
        failure: str | None = None,
        at_start: bool = False,
    ) -> None:
        """Hands a captured state to the publisher's thread. The arguments are those of `Sync`."""
        sync = Sync(
            self.num_captured, self._epoch, global_step, kind, changes, reverts_to, is_milestone, metrics, self.assets,
            with_anchor=self._wants_anchor and kind == "delta", at_start=at_start, failure=failure,
        )  # fmt: skip
        self.assets = ()
        self._wants_anchor = False
        self.num_captured += 1
        self._in_flight.append(sync)
        self._publisher.submit(sync)

    def make_room(self, *, must_capture: bool) -> bool:
        """Processes the outcomes that are there, and returns whether a sync may be captured. Collective.

        Waits until there is room when the policy is `wait`, or with `must_capture`.
        """
        self.settle()
        # An anchor is read from the baseline, which a capture would change. So no sync may follow one with an anchor.
        limit = 1 if any(sync.with_anchor for sync in self._in_flight) else self._settings.max_in_flight
        if len(self._in_flight) < limit:
            return True
        if self._settings.on_backlog == "fold" and not must_capture:
            return False
        self._publisher.wait_for(self.num_captured - limit + 1)
        self.settle()
        return True

    def flush(self) -> None:
        """Waits until all captured syncs are settled on every rank. Collective."""
        self._publisher.wait_for(self.num_captured)
        self.settle()

    def wait(self) -> None:
        """Waits until all captured syncs are settled on this rank. Not collective; the outcomes stay unprocessed."""
        self._publisher.wait_for(self.num_captured)
        for sync in self._in_flight:
            self._raise_if_fatal(self._publisher.outcome(sync.sequence), sync)

    def settle(self) -> None:
        """Processes the outcomes that every rank has. Collective.

        After a failure the baseline is rewound over all syncs in flight.
        """
        num_settled = self._group.minimum(self._publisher.num_outcomes)
        for sequence in range(self._num_settled, num_settled):
            outcome = self._publisher.outcome(sequence)
            self._num_settled = sequence + 1
            if outcome.status == "committed":
                self._take_commit(outcome)
            elif outcome.status == "failed":
                self._handle_failure(outcome)

    def version_of(self, sequence: int) -> int | None:
        """Returns the version that a settled sync became, -1 being the start; None when it became none."""
        if sequence < 0:
            return self.settled.version if self.settled else None
        outcome = self._publisher.outcome(sequence)
        return outcome.version if outcome.status == "committed" else None

    def _take_commit(self, outcome: SyncOutcome) -> None:
        sync = self._in_flight.popleft()
        is_under_way = any(sync.with_anchor for sync in self._in_flight)
        self._wants_anchor = outcome.wants_anchor and not is_under_way
        self.committed.append(outcome.version)
        self.settled = VersionMark(
            self._chain.url, outcome.version, outcome.commit_id, self._settings.run_id, self._settings.stage,
            sync.global_step,
        )  # fmt: skip
        self.is_milestone = sync.is_milestone
        self.payload_nbytes += outcome.payload_nbytes

    def _raise_if_fatal(self, outcome: SyncOutcome, failed: Sync) -> None:
        """Raises what a failed sync ends training with, if the policy does not skip it."""
        if outcome.status != "failed":
            return
        if outcome.is_conflict:
            raise CommitConflictError(outcome.reason, version=outcome.version)
        if self._settings.on_publish_error == "stop":
            raise PublishError(
                f"version {outcome.version} (step {failed.global_step}) could not be committed: {outcome.reason}. "
                "Fix the cause and run again: training resumes from its last checkpoint",
                version=outcome.version,
                reason=outcome.reason,
            )

    def _handle_failure(self, outcome: SyncOutcome) -> None:
        failed = self._in_flight[0]
        self._raise_if_fatal(outcome, failed)
        for sync in reversed(self._in_flight):
            self._baseline.rewind(sync.changes)
        self.assets = next((s.assets for s in self._in_flight if s.assets), ())
        self._in_flight.clear()
        self._epoch += 1
        if self._group.rank == 0:
            # Best effort: the bucket may be the cause of the failure.
            best_effort(f"recording that version {outcome.version} was skipped", lambda: self._record(outcome, failed))

    def _record(self, outcome: SyncOutcome, failed: Sync) -> None:
        record = {"status": "skipped", "reason": outcome.reason, "global_step": failed.global_step}
        write_record(self._chain, GAPS, outcome.version, f"step-{failed.global_step}", record)
