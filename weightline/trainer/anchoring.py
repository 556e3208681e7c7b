"""Anchors written by the ranks themselves: each encodes its own part of the baseline, so no one ever holds the model.

An anchor is a shortcut to a committed version. When it cannot be written nothing is lost but bytes for late joiners.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from weightline.chain.read.history import Chain
from weightline.chain.replay.plan import Hop, hop_of, hop_of_shortcut, plan_between
from weightline.chain.upkeep.compact import AnchorPolicy
from weightline.chain.write.commit import put_signed
from weightline.codec.anchor import ANCHOR_CODING
from weightline.errors import ObjectExistsError, WeightlineError
from weightline.format import keys
from weightline.format.manifest import Manifest, PayloadRef, utc_now
from weightline.format.shortcut import Shortcut
from weightline.format.write_payload import write_anchor
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import RankGroup
from weightline.trainer.sync import PayloadPart


@dataclass(slots=True)
class LateJoiner:
    """Rank 0's account of what a reader that starts from nothing would fetch."""

    policy: AnchorPolicy
    hops: list[Hop] = field(default_factory=list)

    @classmethod
    def of(cls, chain: Chain, tip: int | None, policy: AnchorPolicy) -> LateJoiner:
        """As the bucket stands."""
        return cls(policy, [] if tip is None else list(plan_between(chain, None, tip).hops))

    def saw(self, manifest: Manifest) -> None:
        """A version was committed."""
        hop = hop_of(manifest)
        self.hops = [hop] if hop.base_version is None else [*self.hops, hop]

    def wants_anchor(self, num_elements: int) -> bool:
        """Whether the next version should get an anchor."""
        return bool(self.hops) and self.policy.wants_anchor(self.hops, num_elements)


def write_anchor_shortcut(
    chain: Chain, version: int, commit_id: str, baseline: Baseline, group: RankGroup, late_joiner: LateJoiner
) -> str | None:
    """Collective, on publisher threads, while the baseline is that version's state. Returns why it failed, or None."""
    parts = group.gather_to_first(_upload_part(chain, version, commit_id, baseline, group.rank))
    reason = None
    if group.rank == 0:
        reason = next((f"rank {part.rank}: {part.error}" for part in parts if part.error), None)
        if reason is None:
            reason = _put_shortcut(chain, version, parts, late_joiner)
    told: str | None = group.from_first(reason)
    return told


def _upload_part(chain: Chain, version: int, commit_id: str, baseline: Baseline, rank: int) -> PayloadPart:
    try:
        with tempfile.TemporaryDirectory(prefix="weightline-") as folder:
            path = Path(folder) / "anchor.safetensors"
            info = write_anchor(path, baseline.segments())
            key = keys.payload(version, f"{commit_id}-anchor", rank)
            chain.store.put_file(key, path)
            return PayloadPart(rank, key, info.nbytes, info.sha256)
    except (WeightlineError, OSError) as error:
        return PayloadPart(rank, error=f"{type(error).__name__}: {error}")


def _put_shortcut(chain: Chain, version: int, parts: list[PayloadPart], late_joiner: LateJoiner) -> str | None:
    try:
        manifest = chain.manifest(version)
        payloads = tuple(
            PayloadRef(key=p.key, nbytes=p.nbytes, sha256=p.sha256, rank=p.rank) for p in parts if p.key is not None
        )
        shortcut = Shortcut(
            version=version,
            base_version=None,
            commit_id=manifest.commit_id,
            base_commit_id=None,
            created_at=utc_now(),
            coding=ANCHOR_CODING,
            num_changed=manifest.num_elements,
            payload_nbytes=sum(payload.nbytes for payload in payloads),
            payloads=payloads,
        )
        put_signed(chain.store, shortcut.key, shortcut.to_bytes())
    except ObjectExistsError:
        return None
    except (WeightlineError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    late_joiner.hops = [hop_of_shortcut(shortcut)]
    return None
