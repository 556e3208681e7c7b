"""Where a training process stands against its chain before its first step.

Three ways in: the chain is empty (commit an anchor), the loaded weights are the tip (go on), or a resumed checkpoint is
behind or beside the tip (commit a revert, or a delta that leads to it). Anything else is a mistake, and refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from weightline.chain.read.history import Chain
from weightline.chain.replay.diff import tensor_groups
from weightline.chain.replay.fetch import fetching
from weightline.chain.replay.state import read_state
from weightline.codec.capture import capture
from weightline.codec.digest import digest_to_limbs, format_digest, limbs_to_digest
from weightline.errors import BaseMismatchError
from weightline.format.manifest import Manifest
from weightline.trainer.baseline import Baseline
from weightline.trainer.group import RankGroup
from weightline.types import Changes, TensorSpec


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What has to be committed before the first step. The same on every rank."""

    action: Literal["anchor", "continue", "revert", "delta"]
    tip: int | None
    reverts_to: int | None = None


def summed_digests(own: dict[str, int], names: Iterable[str], group: RankGroup) -> dict[str, int]:
    """The state digest of every tensor of that name, on rank 0, from every rank's contributions. Collective."""
    names = tuple(names)
    limbs = torch.tensor([digest_to_limbs(own.get(name, 0)) for name in names], dtype=torch.int64).reshape(-1, 4)
    rows = group.sum_to_first(limbs).tolist()
    return {name: limbs_to_digest(row) for name, row in zip(names, rows, strict=True)}


def plan_start(
    chain: Chain, loaded: dict[str, int], specs: dict[str, TensorSpec], *, is_resumed: bool, run_id: str, stage: str
) -> StartPlan:
    """Decide on rank 0. BaseMismatchError when the weights are not the tip's and this is no resume. Reads only.

    A stage that starts anew although this very run of it has committed versions died before its first checkpoint: that
    is a resume, too, from the version that it started from.
    """
    tip_version = chain.tip_version()
    if tip_version is None:
        return StartPlan("anchor", None)
    tip = chain.manifest(tip_version)
    if tip.specs != specs:
        name = next(iter(set(tip.specs.items()) ^ set(specs.items())))[0]
        raise BaseMismatchError(
            f"{chain.url} holds another model: tensor {name} is {tip.specs.get(name)} there, {specs.get(name)} here. "
            "Name a chain of its own for this model",
            tensor=name, version=tip_version, expected=str(tip.specs.get(name)), actual=str(specs.get(name)),
        )  # fmt: skip
    written = {name: format_digest(digest) for name, digest in loaded.items()}
    if tip.digests == written:
        return StartPlan("continue", tip_version)
    earlier = next((v for v in range(tip_version - 1, -1, -1) if chain.manifest(v).digests == written), None)
    if earlier is not None and (is_resumed or _are_of(chain.manifests(earlier + 1, tip_version), run_id, stage)):
        return StartPlan("revert", tip_version, earlier)
    if is_resumed:
        return StartPlan("delta", tip_version)
    name = next(name for name, digest in written.items() if tip.digests[name] != digest)
    raise BaseMismatchError(
        f"the loaded weights are not version {tip_version} of {chain.url} (tensor {name}: digest {written[name]}, "
        f"there {tip.digests[name]}). Start from that version (weightline pull), or name a new chain",
        tensor=name, version=tip_version, expected=tip.digests[name], actual=written[name],
    )  # fmt: skip


def _are_of(manifests: Iterable[Manifest], run_id: str, stage: str) -> bool:
    return all((manifest.run_id, manifest.stage) == (run_id, stage) for manifest in manifests)


def changes_from_tip(chain: Chain, tip: int, baseline: Baseline, *, ranked: bool) -> list[Changes]:
    """What leads from the chain's tip to this rank's baseline, by the chain alone, some tensors at a time."""
    found = []
    with fetching(chain.store) as fetcher:
        for names in tensor_groups([shard.segment.tensor for shard in baseline.shards]):
            state = read_state(chain, tip, names.__contains__, fetcher)
            for segment, bits_N in baseline.segments():
                if segment.tensor.name in names:
                    found.append(capture(segment, state.segment_bits(segment), bits_N, ranked=ranked))
    return [changes for changes in found if changes.num_changed]
