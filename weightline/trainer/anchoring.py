"""Writes anchors from the ranks: each encodes its own part of the baseline, so no rank holds the model.

An anchor is a shortcut to a committed version. It is optional: without it, new replicas replay more deltas.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import Hop, hop_of, hop_of_shortcut, plan_between
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.chain.write.commit import put_shortcut
from weightline.chain.write.draft import Draft
from weightline.codec.anchor import ANCHOR_CODING
from weightline.format.manifest import Header
from weightline.format.write_payload import write_anchor
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import Failure, RankGroup, attempt
from weightline.trainer.sync import PayloadPart, add_parts


@dataclass(slots=True)
class LateJoiner:
    """The hops that a reader without any version would fetch. Only valid on rank 0."""

    policy: AnchorPolicy
    hops: list[Hop] = field(default_factory=list)

    @classmethod
    def of(cls, chain: Chain, tip: int | None, policy: AnchorPolicy) -> LateJoiner:
        """Reads the hops from the bucket."""
        return cls(policy, [] if tip is None else list(plan_between(chain, None, tip).hops))

    def add(self, manifest: Header) -> None:
        """Adds the hop of a version that was committed."""
        hop = hop_of(manifest)
        self.hops = [hop] if hop.base_version is None else [*self.hops, hop]

    def wants_anchor(self, num_elements: int) -> bool:
        """Returns whether the next version should get an anchor."""
        return bool(self.hops) and self.policy.wants_anchor(self.hops, num_elements)


def write_anchor_shortcut(
    chain: Chain, version: Draft, baseline: Baseline, group: RankGroup, late_joiner: LateJoiner
) -> str | None:
    """Writes an anchor of a version, which the baseline must hold meanwhile. Collective, on publisher threads.

    Returns the reason of a failure, the same on every rank; None after success.
    """
    draft = Draft(version.version, f"{version.attempt_id}-anchor")
    part = attempt(lambda: _upload_part(chain, draft, baseline, group.rank))
    if isinstance(part, Failure):
        part = PayloadPart(group.rank, error=part.reason)
    parts: list[PayloadPart] = group.gather_to_first(part)
    reason = None
    if group.rank == 0:
        reason = next((f"rank {part.rank}: {part.error}" for part in parts if part.error), None)
        if reason is None:
            put = attempt(lambda: _put_shortcut(chain, draft, parts, late_joiner))
            reason = put.reason if isinstance(put, Failure) else None
    agreed: str | None = group.from_first(reason)
    return agreed


def _upload_part(chain: Chain, draft: Draft, baseline: Baseline, rank: int) -> PayloadPart:
    with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
        path = Path(folder) / "anchor.safetensors"
        info = write_anchor(path, baseline.segments())
        chain.store.put_file(draft.key(rank), path)
        return PayloadPart(rank, info.nbytes, info.sha256)


def _put_shortcut(chain: Chain, draft: Draft, parts: list[PayloadPart], late_joiner: LateJoiner) -> None:
    add_parts(draft, parts)
    shortcut = put_shortcut(chain, draft.shortcut(chain.header(draft.version), None, ANCHOR_CODING))
    late_joiner.hops = [hop_of_shortcut(shortcut)]
