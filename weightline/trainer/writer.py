"""One rank's part in writing one version: gather, delta, upload, and on rank 0 the commit.

Runs on the rank's background thread. Each version takes three collectives, also when a rank has failed: the sum of
digests, the gathering of reports on payloads, and the broadcast of the outcome. No rank holds another rank's weights.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from weightline.chain.files.assets import ASSETS_EVERY
from weightline.chain.read.history import Chain
from weightline.chain.write.commit import commit_version
from weightline.chain.write.draft import Authorship, Draft
from weightline.codec.digest import digest_change, digest_to_limbs, limbs_to_lanes
from weightline.errors import ConflictError
from weightline.format.manifest import AdapterBase, AssetRef, Header
from weightline.format.state_digests import StateDigests
from weightline.format.tensor_layout import Layout
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.trainer.anchoring import LateJoiner, write_anchor_shortcut
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import Failure, RankGroup, attempt
from weightline.trainer.published_dtype import explain_large_change
from weightline.trainer.settings import PublishSettings
from weightline.trainer.steps import Step, StepFacts, StepName, StepObserver
from weightline.trainer.sync import PayloadPart, Sync, SyncOutcome, add_parts

_logger = logging.getLogger(__name__)


def commit_id_of(session_id: str, sequence: int) -> str:
    """Returns the commit_id of a session's sync, the same on every rank and at every attempt."""
    return hashlib.blake2b(f"{session_id}/{sequence}".encode(), digest_size=16).hexdigest()


@dataclass(slots=True, kw_only=True)
class VersionWriter:
    """Writes one version after the other. `digests` and `base_model` are valid on rank 0 only."""

    chain: Chain
    settings: PublishSettings
    session_id: str
    """Random id from rank 0. It makes the object keys of every attempt unique."""
    layout: Layout
    """The tensors that the chain holds, the same on every rank."""
    baseline: Baseline
    base_model: AdapterBase | None
    """The base model of an adapter; None for a whole model."""
    assets: tuple[AssetRef, ...]
    """The model's small files. In format 1, every `ASSETS_EVERY`-th version names them again."""
    group: RankGroup
    observer: StepObserver
    tip: int | None
    """The version that the next one builds on."""
    digests: StateDigests
    """State digests of the tip."""
    late_joiner: LateJoiner
    on_committed: Callable[[int, str], object]
    """Called on rank 0 with version and commit_id once the version exists. It must be quick and raise nothing."""
    _has_explained_large_change: bool = False

    def write(self, sync: Sync) -> SyncOutcome:
        """Publishes the sync as the next version. Collective. An error on any rank becomes a failed outcome on all.

        Not safe to repeat for a committed sync. A crash before the commit leaves orphaned payloads, which gc removes.
        """
        commit_id = commit_id_of(self.session_id, sync.sequence)
        draft = Draft(0 if self.tip is None else self.tip + 1, commit_id)
        # Row per tensor: four 32-bit limbs of the digest's change, then the number of changed elements.
        totals = torch.zeros((len(self.layout), 5), dtype=torch.int64)
        part = attempt(lambda: self._upload_part(sync, draft, totals))
        if isinstance(part, Failure):
            part = PayloadPart(self.group.rank, error=part.reason)
        totals = self.group.sum_to_first(totals)
        parts: list[PayloadPart] = self.group.gather_to_first(part)
        outcome: SyncOutcome = self.group.from_first(
            self._commit(sync, draft, parts, totals) if self.group.rank == 0 else None
        )
        if outcome.status == "committed":
            self.tip = outcome.version
            if sync.with_anchor:
                self._write_anchor(draft)
        return outcome

    def _step(self, name: StepName, version: int) -> Step:
        return Step(name, version, self.group.rank, self.group.world_size, self.chain.url, self.observer)

    def _upload_part(self, sync: Sync, draft: Draft, totals: torch.Tensor) -> PayloadPart:
        """Runs the three steps of every rank. Fills in this rank's `totals`."""
        rank = self.group.rank
        if sync.failure is not None:
            return PayloadPart(rank, error=sync.failure)
        with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
            path = Path(folder) / "payload.safetensors"
            with self._step("gather_partition", draft.version) as step:
                self._sum_changes(sync, totals)
                num_elements = sum(shard.segment.length for shard in self.baseline.shards)
                step.report(StepFacts(num_changed=int(totals[:, 4].sum()), num_elements=num_elements))
            with self._step("compute_delta", draft.version) as step:
                info = self._encode(sync, path)
                step.report(StepFacts(payload_nbytes=info.nbytes if info else 0))
            if info is None:
                return PayloadPart(rank)
            with self._step("upload_payload", draft.version) as step:
                self.chain.store.put_file(draft.key(rank), path)
                step.report(StepFacts(payload_nbytes=info.nbytes))
        return PayloadPart(rank, info.nbytes, info.sha256)

    def _sum_changes(self, sync: Sync, totals: torch.Tensor) -> None:
        """Fills `totals` with the change of digest and the number of changed elements, a row for each tensor."""
        row_of = self.layout.index
        if sync.kind == "anchor":
            rows = {row_of[name]: (digest, 0) for name, digest in self.baseline.digests().items()}
        else:
            rows = {row_of[c.segment.tensor.name]: (digest_change(c), c.num_changed) for c in sync.changes}
        for row, (digest, num_changed) in rows.items():
            totals[row] = torch.tensor([*digest_to_limbs(digest), num_changed], dtype=torch.int64)

    def _encode(self, sync: Sync, path: Path) -> PayloadInfo | None:
        """Writes the payload file; None when nothing of this rank's partition changed."""
        if sync.kind == "anchor":
            return write_anchor(path, self.baseline.segments())
        return write_delta(path, sync.changes, self.settings.coding) if sync.changes else None

    def _commit(self, sync: Sync, draft: Draft, parts: list[PayloadPart], totals: torch.Tensor) -> SyncOutcome:
        """Commits one version of all ranks' payloads, and returns the outcome. For rank 0."""
        for part in parts:
            if part.error is not None:
                return SyncOutcome(sync.sequence, draft.version, "failed", f"rank {part.rank}: {part.error}")
        header = attempt(lambda: self._put_version(sync, draft, parts, totals))
        if isinstance(header, Failure):
            is_conflict = isinstance(header.error, ConflictError)
            reason = str(header.error) if is_conflict else f"commit: {header.reason}"
            return SyncOutcome(sync.sequence, draft.version, "failed", reason, is_conflict)
        self.late_joiner.add(header)
        wants_anchor = not sync.with_anchor and self.late_joiner.wants_anchor(header.num_elements)
        return SyncOutcome(
            sync.sequence, draft.version, "committed", wants_anchor=wants_anchor,
            payload_nbytes=header.payload_nbytes, commit_id=draft.attempt_id,
        )  # fmt: skip

    def _put_version(self, sync: Sync, draft: Draft, parts: list[PayloadPart], totals: torch.Tensor) -> Header:
        digests = self._digests_after(sync, totals)
        settings = self.settings
        assets = sync.assets or (self.assets if draft.version % ASSETS_EVERY == 0 else ())
        author = Authorship(
            stage=settings.stage, run_id=settings.run_id, global_step=sync.global_step, kind=sync.kind,
            coding=settings.coding, reverts_to=sync.reverts_to, base_model=self.base_model,
            is_milestone=sync.is_milestone, assets=assets, metrics=sync.metrics.values,
            provenance=settings.provenance,
        )  # fmt: skip
        add_parts(draft, parts)
        draft.num_changed = int(totals[:, 4].sum())
        new = draft.new_version(author, digests, world_size=self.group.world_size)
        with self._step("commit_version", draft.version) as step:
            # Remote stores retry transient errors. If the bucket stays unavailable, the version counts as failed. If it
            # was committed nevertheless, the next commit is a conflict, which stops training.
            header = commit_version(self.chain, new)
            step.report(StepFacts.of_commit(header))
        self.on_committed(draft.version, draft.attempt_id)
        self.digests, self.assets = digests, sync.assets or self.assets
        if sync.kind == "delta" and not sync.at_start:
            self._explain_large_change(totals)
        return header

    def _explain_large_change(self, totals: torch.Tensor) -> None:
        """Warns, once a session, when a sync changed more than half of all elements."""
        if self._has_explained_large_change or 2 * int(totals[:, 4].sum()) <= self.layout.num_elements:
            return
        warning = explain_large_change(dict(zip(self.layout.specs, totals[:, 4].tolist(), strict=True)))
        if warning is not None:
            self._has_explained_large_change = True
            _logger.warning("%s", warning)

    def _digests_after(self, sync: Sync, totals: torch.Tensor) -> StateDigests:
        changes_T = limbs_to_lanes(totals[:, :4].numpy())
        # Lanes wrap around, as the digest's do.
        digests_T = changes_T if sync.kind == "anchor" else self.digests.digests_T + changes_T
        return StateDigests(self.layout, digests_T)

    def _write_anchor(self, draft: Draft) -> None:
        reason = write_anchor_shortcut(self.chain, draft, self.baseline, self.group, self.late_joiner)
        if reason is not None and self.group.rank == 0:
            _logger.warning("version %d is committed, its anchor is not: %s", draft.version, reason)
