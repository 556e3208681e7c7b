"""Publishing from the training thread: decide at each sync, the same on every rank, and never block longer than asked.

Every decision is a function of numbers that all ranks share: how many syncs were captured, and how many are settled on
all of them (one int64 all-reduce over gloo a sync). So no rank ever skips or repeats a capture that another one makes.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from weightline.chain.files.assets import assets_of, require_base
from weightline.chain.read.history import Chain
from weightline.chain.read.records import GAPS, write_record
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.chain.write.commit import check_signing_key
from weightline.codec.coding import coding_named, codings
from weightline.codec.digest import parse_digest, tensor_digest
from weightline.codec.torch_ops import bits_of
from weightline.errors import CommitConflictError, InputError, PublishError, StorageError, WeightlineError
from weightline.format.manifest import AdapterBase, AssetRef
from weightline.naming import CheckpointTensor, checkpoint_tensors
from weightline.store.open import check_writable
from weightline.trainer.adapter import AdapterParts, adapter_names, adapter_parts, base_model_of, is_peft_model
from weightline.trainer.anchoring import LateJoiner
from weightline.trainer.assets import upload_assets
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import RankGroup
from weightline.trainer.partition import shards_of
from weightline.trainer.publisher import Publisher
from weightline.trainer.start import StartPlan, changes_from_tip, plan_start, summed_digests
from weightline.trainer.steps import NoObserver, StepObserver
from weightline.trainer.sync import Outcome, Sync
from weightline.trainer.writer import VersionWriter, WriterContext
from weightline.types import Changes, TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """How a training process publishes. Torch-free values, one meaning each."""

    stage: str = "train"
    """Label of every version: sft, dpo, grpo, ..."""
    run_id: str = "run"
    """Names the run in every manifest."""
    sync_steps: int = 1
    """Optimizer steps between two versions."""
    step_observer: str | None = None
    """`module:function` that makes the `StepObserver`. None: what WEIGHTLINE_STEP_OBSERVER names, if anything."""
    coding: str = "gap-by-magnitude"
    """How payloads are coded."""
    max_in_flight: int = 2
    """Syncs that may be captured and not settled. Bounds host memory."""
    on_backlog: Literal["wait", "fold"] = "wait"
    """When the bucket is slower than training: wait for it, or let the next sync span both."""
    on_publish_error: Literal["stop", "skip_and_record"] = "stop"
    """When a version cannot be committed: stop training, or go on and let the next version span the gap."""
    anchor_policy: AnchorPolicy = field(default_factory=AnchorPolicy)
    """When a full state is written beside a version, for those who join late."""
    timeout_seconds: float = 1800.0
    """How long a rank waits for the others before it gives up."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Links for people, copied into every manifest."""

    def __post_init__(self) -> None:
        for name in ("sync_steps", "max_in_flight"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: name 1 or more", field=name)
        for name, known in (
            ("on_backlog", ("wait", "fold")),
            ("on_publish_error", ("stop", "skip_and_record")),
            ("coding", tuple(codings())),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}: name one of {', '.join(known)}", field=name)


class PublishSession:
    """One training process's publishing. All methods are collective and belong to the training thread."""

    def __init__(self, chain: Chain, settings: PublishSettings, observer: StepObserver | None = None) -> None:
        self.chain, self.settings, self.observer = chain, settings, observer or NoObserver()
        self.group = RankGroup(settings.timeout_seconds)
        self._publisher_group = RankGroup(settings.timeout_seconds)
        self._baseline: Baseline
        self._publisher: Publisher
        self._assets: tuple[AssetRef, ...] = ()
        self._in_flight: deque[Sync] = deque()
        self._num_captured = 0
        self._num_settled = 0
        self._epoch = 0
        self._wants_anchor = False
        self.last_step = -1
        """Training step of the newest capture."""

    def start(self, model: Any, processing_class: Any, global_step: int) -> StartPlan:
        """Find where the loaded weights stand, and commit what is missing before the first step.

        BaseMismatchError, StorageError: on every rank, before anything is trained.
        """
        tensors, base_model = self._published(model)
        shards = shards_of(tensors, self.group.rank, self.group.world_size)
        specs = {published.spec.name: published.spec for published in tensors}
        self._baseline = Baseline(shards, ranked=coding_named(self.settings.coding).ranked)
        plan: StartPlan
        loaded = summed_digests(self._baseline.digests(), specs, self.group)
        plan, base_model, assets, session_id = self._on_first(
            lambda: self._open(model, processing_class, base_model, specs, loaded, global_step)
        )
        tip_digests: dict[str, int] = {}
        if plan.tip is not None and self.group.rank == 0:
            tip_digests = {n: parse_digest(d) for n, d in self.chain.manifest(plan.tip).digests.items()}
        settings = self.settings
        context = WriterContext(
            self.chain, session_id, settings.run_id, settings.stage, settings.coding, specs, self._baseline,
            settings.provenance, base_model,
        )  # fmt: skip
        tip_on_first = plan.tip if self.group.rank == 0 else None
        late_joiner = LateJoiner.of(self.chain, tip_on_first, settings.anchor_policy)
        writer = VersionWriter(context, self._publisher_group, self.observer, plan.tip, tip_digests, late_joiner)
        self._publisher = Publisher(writer)
        self._assets = assets
        if plan.action != "continue":
            self._commit_start(plan, global_step)
        self.last_step = global_step
        return plan

    def _published(self, model: Any) -> tuple[tuple[CheckpointTensor, ...], AdapterBase | None]:
        """What the chain holds of the model: all of it, or an adapter and on rank 0 the base that it belongs to."""
        if not is_peft_model(model):
            return checkpoint_tensors(model), None
        parts: AdapterParts = adapter_parts(model, self._on_first(lambda: adapter_names(model)))
        own = {}
        for shard in shards_of(parts.base, self.group.rank, self.group.world_size):
            bits_N = bits_of(shard.read().cpu().contiguous())
            own[shard.segment.tensor.name] = tensor_digest(shard.segment, bits_N)
        digests = summed_digests(own, (published.spec.name for published in parts.base), self.group)
        return parts.adapter, base_model_of(model, parts, digests)

    def _open(
        self,
        model: Any,
        processing_class: Any,
        base_model: AdapterBase | None,
        specs: dict[str, TensorSpec],
        loaded: dict[str, int],
        global_step: int,
    ) -> tuple[StartPlan, AdapterBase | None, tuple[AssetRef, ...], str]:
        """Rank 0: the bucket takes writes, the base, the plan, the model's files."""
        check_signing_key()
        check_writable(self.chain.store)
        tip = self.chain.tip_version()
        recorded = None if tip is None else self.chain.manifest(tip).base_model
        base_model = require_base(recorded, base_model, chain_url=self.chain.url)
        settings = self.settings
        is_resumed = global_step > 0
        plan = plan_start(
            self.chain, loaded, specs, is_resumed=is_resumed, run_id=settings.run_id, stage=settings.stage
        )
        held = () if plan.tip is None else assets_of(self.chain, plan.tip)
        assets = upload_assets(self.chain.store, model, processing_class, held)
        if assets == held:
            assets = ()
        return plan, base_model, assets, secrets.token_hex(16)

    def _on_first(self, decide: Callable[[], Any]) -> Any:
        """Run on rank 0, raise or return the same everywhere: no rank may be left waiting in a collective."""
        result: Any = None
        if self.group.rank == 0:
            try:
                result = decide()
            except WeightlineError as error:
                result = error
        result = self.group.from_first(result)
        if isinstance(result, Exception):
            raise result
        return result

    def _commit_start(self, plan: StartPlan, global_step: int) -> None:
        ranked = coding_named(self.settings.coding).ranked
        found = [] if plan.tip is None else changes_from_tip(self.chain, plan.tip, self._baseline, ranked=ranked)
        kind: Literal["anchor", "delta", "revert"] = "anchor" if plan.action == "continue" else plan.action
        self._submit(kind, tuple(found), global_step, is_milestone=kind == "anchor", reverts_to=plan.reverts_to)
        self.flush()

    def sync(
        self,
        global_step: int,
        *,
        metrics: dict[str, float] | None = None,
        is_milestone: bool = False,
        must_capture: bool = False,
    ) -> bool:
        """Capture this rank's partition and hand it to the publisher.

        False when it was folded into the next sync, which neither a milestone nor `must_capture` allows.

        PublishError when an earlier version could not be committed and the policy is `stop`.
        """
        self._settle(self.group.minimum(self._publisher.num_outcomes))
        if not self._make_room(must_capture=is_milestone or must_capture):
            return False
        changes = tuple(self._baseline.capture())
        self._submit("delta", changes, global_step, is_milestone=is_milestone, metrics=metrics or {})
        return True

    def flush(self) -> None:
        """Wait until everything captured is settled on every rank. PublishError as in `sync`."""
        self._publisher.wait_for(self._num_captured)
        self._settle(self.group.minimum(self._publisher.num_outcomes))

    def close(self) -> None:
        """Settle, and end the background thread. Safe to repeat."""
        self._publisher.close()
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
    ) -> None:
        sync = Sync(
            self._num_captured, self._epoch, global_step, kind, changes, reverts_to, is_milestone, metrics or {},
            self._assets, with_anchor=self._wants_anchor and kind == "delta",
        )  # fmt: skip
        self._assets = ()
        self._wants_anchor = False
        self._num_captured += 1
        self._in_flight.append(sync)
        self._publisher.submit(sync)
        self.last_step = global_step

    def _make_room(self, *, must_capture: bool) -> bool:
        # An anchor is read from the baseline, which a capture would move: one under way takes all the room.
        limit = 1 if any(sync.with_anchor for sync in self._in_flight) else self.settings.max_in_flight
        if len(self._in_flight) < limit:
            return True
        if self.settings.on_backlog == "fold" and not must_capture:
            return False
        self._publisher.wait_for(self._num_captured - limit + 1)
        self._settle(self.group.minimum(self._publisher.num_outcomes))
        return True

    def _settle(self, num_settled: int) -> None:
        """Take note of outcomes that every rank has. After a failure, rewind the baseline over all that is void."""
        for sequence in range(self._num_settled, num_settled):
            outcome = self._publisher.outcome(sequence)
            self._num_settled = sequence + 1
            if outcome.status == "committed":
                self._in_flight.popleft()
                is_under_way = any(sync.with_anchor for sync in self._in_flight)
                self._wants_anchor = outcome.wants_anchor and not is_under_way
            elif outcome.status == "failed":
                self._handle_failure(outcome)

    def _handle_failure(self, outcome: Outcome) -> None:
        failed = self._in_flight[0]
        if outcome.is_conflict:
            raise CommitConflictError(outcome.reason, version=outcome.version)
        if self.settings.on_publish_error == "stop":
            raise PublishError(
                f"version {outcome.version} (step {failed.global_step}) could not be committed: {outcome.reason}. "
                "Mend the bucket and run again: training resumes from its last checkpoint",
                version=outcome.version,
                reason=outcome.reason,
            )
        for sync in reversed(self._in_flight):
            self._baseline.rewind(sync.changes)
        self._assets = next((s.assets for s in self._in_flight if s.assets), ())
        self._in_flight.clear()
        self._epoch += 1
        if self.group.rank == 0:
            self._record_gap(outcome, failed)

    def _record_gap(self, outcome: Outcome, failed: Sync) -> None:
        """Leave word of the skipped sync beside the chain, if the bucket takes it: it may be the bucket that is ill."""
        record = {"status": "skipped", "reason": outcome.reason, "global_step": failed.global_step}
        try:
            write_record(self.chain, GAPS, outcome.version, f"step-{failed.global_step}", record)
        except StorageError:
            return
