"""One rank's part in writing one version: gather, delta, upload, and on rank 0 the commit.

Runs on the rank's background thread. Ranks meet three times a version, whatever happened to any of them: digests are
summed, payload facts gathered, the outcome told. No rank ever holds another one's weights.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightline.chain.read.history import Chain
from weightline.chain.write.commit import commit_manifest
from weightline.chain.write.draft import Authorship, build_manifest
from weightline.codec.digest import add_digests, digest_change, digest_to_limbs, limbs_to_digest
from weightline.errors import ConflictError, TransientStorageError, WeightlineError
from weightline.format import keys
from weightline.format.manifest import AdapterBase, Manifest, PayloadRef, utc_now
from weightline.format.write_payload import PayloadInfo, write_anchor, write_delta
from weightline.trainer.anchoring import LateJoiner, write_anchor_shortcut
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import RankGroup
from weightline.trainer.steps import Step, StepFacts, StepName, StepObserver
from weightline.trainer.sync import Outcome, PayloadPart, Sync
from weightline.types import TensorSpec

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriterContext:
    """What stays the same for all versions that this process writes."""

    chain: Chain
    session_id: str
    """Random, rank 0's: makes every attempt's object keys its own."""
    run_id: str
    stage: str
    coding: str
    specs: dict[str, TensorSpec]
    baseline: Baseline
    provenance: dict[str, str] = field(default_factory=dict)
    base_model: AdapterBase | None = None
    """What an adapter belongs to; counts on rank 0 only."""


@dataclass(slots=True)
class VersionWriter:
    """Knows the tip that the next version builds on. `digests` counts on rank 0 only."""

    context: WriterContext
    group: RankGroup
    observer: StepObserver
    tip: int | None
    digests: dict[str, int]
    late_joiner: LateJoiner

    def write(self, sync: Sync) -> Outcome:
        """Collective. Publish the sync as the next version; never raises for a failing bucket, disk or encoder.

        Not safe to repeat for a committed sync. A crash before the commit leaves orphaned payloads, which gc removes.
        """
        attempt = _Attempt(self, sync)
        part = attempt.upload_part()
        totals = self.group.sum_to_first(attempt.totals)
        parts = self.group.gather_to_first(part)
        outcome: Outcome = self.group.from_first(attempt.commit(parts, totals) if self.group.rank == 0 else None)
        if outcome.status == "committed":
            self.tip = outcome.version
            if sync.with_anchor:
                self._write_anchor(attempt)
        return outcome

    def _write_anchor(self, attempt: _Attempt) -> None:
        context = self.context
        reason = write_anchor_shortcut(
            context.chain, attempt.version, attempt.commit_id, context.baseline, self.group, self.late_joiner
        )
        if reason is not None and self.group.rank == 0:
            _logger.warning("version %d is committed, its anchor is not: %s", attempt.version, reason)


class _Attempt:
    """One version being written by this rank."""

    def __init__(self, writer: VersionWriter, sync: Sync) -> None:
        self.writer, self.sync, self.context = writer, sync, writer.context
        self.version = 0 if writer.tip is None else writer.tip + 1
        attempt = f"{self.context.session_id}/{sync.sequence}".encode()
        self.commit_id = hashlib.blake2b(attempt, digest_size=16).hexdigest()
        # Row per tensor: four 32-bit limbs of the digest's change, then the number of changed elements.
        self.totals = torch.zeros((len(self.context.specs), 5), dtype=torch.int64)
        self.info: PayloadInfo | None = None

    def upload_part(self) -> PayloadPart:
        """The three per-rank steps. A failure becomes a fact that the other ranks are told, since they are waiting."""
        rank = self.writer.group.rank
        try:
            with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
                path = Path(folder) / "payload.safetensors"
                self._gather()
                self._encode(path)
                if self.info is None:
                    return PayloadPart(rank)
                key = keys.payload(self.version, self.commit_id, rank)
                self._upload(key, path)
                return PayloadPart(rank, key, self.info.nbytes, self.info.sha256)
        except (WeightlineError, OSError) as error:
            return PayloadPart(rank, error=f"{type(error).__name__}: {error}")

    def commit(self, parts: list[PayloadPart], totals: torch.Tensor) -> Outcome:
        """Rank 0: one manifest for all ranks' payloads, or the reason why there is none."""
        for part in parts:
            if part.error is not None:
                return self._failed(f"rank {part.rank}: {part.error}")
        digests = self._digests_after(totals)
        manifest = self._manifest(parts, digests, num_changed=int(totals[:, 4].sum()))
        try:
            self._commit(manifest)
        except ConflictError as error:
            return self._failed(str(error), is_conflict=True)
        except (WeightlineError, OSError) as error:
            return self._failed(f"commit: {type(error).__name__}: {error}")
        self.writer.digests = digests
        self.writer.late_joiner.saw(manifest)
        wants_anchor = not self.sync.with_anchor and self.writer.late_joiner.wants_anchor(manifest.num_elements)
        return Outcome(self.sync.sequence, self.version, "committed", wants_anchor=wants_anchor)

    def _failed(self, reason: str, *, is_conflict: bool = False) -> Outcome:
        return Outcome(self.sync.sequence, self.version, "failed", reason, is_conflict)

    def _step(self, name: StepName) -> Step:
        group, url = self.writer.group, self.context.chain.url
        return Step(name, self.version, group.rank, group.world_size, url, self.writer.observer)

    def _gather(self) -> None:
        """Sums up what the training thread captured from this rank's partition: counts and digest changes a tensor."""
        with self._step("gather_partition") as step:
            row_of = {name: row for row, name in enumerate(self.context.specs)}
            if self.sync.kind == "anchor":
                changed = self.context.baseline.digests()
                rows = {row_of[name]: (digest, 0) for name, digest in changed.items()}
            else:
                rows = {row_of[c.segment.tensor.name]: (digest_change(c), c.num_changed) for c in self.sync.changes}
            for row, (digest, num_changed) in rows.items():
                self.totals[row] = torch.tensor([*digest_to_limbs(digest), num_changed], dtype=torch.int64)
            num_elements = sum(shard.segment.length for shard in self.context.baseline.shards)
            step.report(StepFacts(num_changed=int(self.totals[:, 4].sum()), num_elements=num_elements))

    def _encode(self, path: Path) -> None:
        with self._step("compute_delta") as step:
            if self.sync.kind == "anchor":
                self.info = write_anchor(path, self.context.baseline.segments())
            elif self.sync.changes:
                self.info = write_delta(path, self.sync.changes, self.context.coding)
            step.report(StepFacts(payload_nbytes=self.info.nbytes if self.info else 0))

    def _upload(self, key: str, path: Path) -> None:
        with self._step("upload_payload") as step:
            self.context.chain.store.put_file(key, path)
            step.report(StepFacts(payload_nbytes=path.stat().st_size))

    def _commit(self, manifest: Manifest) -> None:
        with self._step("commit_version") as step:
            try:
                commit_manifest(self.context.chain, manifest)
            except TransientStorageError:
                # The same commit_id: finds out whether the first took effect. Where the bucket stays away, the version
                # is failed; had it been committed all the same, the next one will be a conflict, which stops training.
                commit_manifest(self.context.chain, manifest)
            step.report(StepFacts.of_commit(manifest))

    def _digests_after(self, totals: torch.Tensor) -> dict[str, int]:
        before = {} if self.sync.kind == "anchor" else self.writer.digests
        rows = zip(self.context.specs, totals[:, :4].tolist(), strict=True)
        return {name: add_digests(before.get(name, 0), limbs_to_digest(limbs)) for name, limbs in rows}

    def _manifest(self, parts: list[PayloadPart], digests: dict[str, int], num_changed: int) -> Manifest:
        sync, context = self.sync, self.context
        author = Authorship(
            stage=context.stage, run_id=context.run_id, global_step=sync.global_step, kind=sync.kind,
            coding=context.coding, reverts_to=sync.reverts_to, base_model=context.base_model,
            is_milestone=sync.is_milestone, assets=sync.assets, metrics=sync.metrics, provenance=context.provenance,
        )  # fmt: skip
        payloads = tuple(
            PayloadRef(key=p.key, nbytes=p.nbytes, sha256=p.sha256, rank=p.rank) for p in parts if p.key is not None
        )
        return build_manifest(
            author, context.specs, digests, payloads, version=self.version, commit_id=self.commit_id,
            created_at=utc_now(), num_changed=num_changed, world_size=self.writer.group.world_size,
        )  # fmt: skip
