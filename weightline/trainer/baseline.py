"""The bits that the chain will have after every capture handed out so far: one copy of the rank's own partition.

A capture advances the baseline at once, so that the next one is against it. When a captured delta cannot be committed,
the baseline is rewound by the old bits that the capture kept, newest first: it never silently differs from the chain.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightline.codec.capture import capture
from weightline.codec.digest import tensor_digest
from weightline.codec.torch_ops import bits_of, capture_tensor, signed_tensor, signed_view
from weightline.trainer.partition import Shard
from weightline.types import BitsArray, Changes, Segment


class Baseline:
    """Holds each shard's last captured elements on the device where training holds them."""

    def __init__(self, shards: Iterable[Shard], *, ranked: bool = False) -> None:
        """Copies the shards as they stand now. `ranked`: what the coding needs of a capture."""
        self.shards = tuple(shards)
        self._ranked = ranked
        self._held: dict[str, torch.Tensor] = {s.segment.tensor.name: s.read().clone() for s in self.shards}

    def capture(self) -> list[Changes]:
        """What changed since the last capture, shard by shard, and advance. Unchanged shards are left out."""
        captured = []
        for shard in self.shards:
            current = shard.read()
            held = self._held[shard.segment.tensor.name]
            changes = _capture(shard.segment, held, current, ranked=self._ranked)
            if changes.num_changed:
                self._scatter(changes, changes.new_K)
                captured.append(changes)
        return captured

    def rewind(self, captured: Iterable[Changes]) -> None:
        """Undo one capture. Several are undone newest first."""
        for changes in captured:
            self._scatter(changes, changes.old_K)

    def segments(self) -> Iterable[tuple[Segment, BitsArray]]:
        """Each shard's baseline bits on the host, one at a time."""
        for shard in self.shards:
            yield shard.segment, bits_of(self._held[shard.segment.tensor.name].cpu())

    def digests(self) -> dict[str, int]:
        """This rank's contribution to each tensor's state digest."""
        return {segment.tensor.name: tensor_digest(segment, bits_N) for segment, bits_N in self.segments()}

    def _scatter(self, changes: Changes, bits_K: BitsArray) -> None:
        held = self._held[changes.segment.tensor.name]
        positions_K = torch.from_numpy(changes.positions_K).to(held.device)
        signed_view(held)[positions_K] = signed_tensor(bits_K).to(held.device)


def _capture(segment: Segment, held: torch.Tensor, current: torch.Tensor, *, ranked: bool) -> Changes:
    """Compare where the tensors are: compiled loops on the host, torch on a device."""
    if held.device.type == current.device.type == "cpu":
        return capture(segment, bits_of(held), bits_of(current.contiguous()), ranked=ranked)
    return capture_tensor(segment, held.to(current.device), current, ranked=ranked)
