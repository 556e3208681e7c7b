"""The baseline: a copy of the rank's partition as of its last capture, against which the next capture compares.

A capture advances the baseline at once. When a captured delta cannot be committed, the baseline is rewound by the old
bits that the captures kept, newest first, so that it equals the chain's state again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightline.codec.digest import tensor_digest
from weightline.codec.torch_ops import bits_of, capture_tensor, signed_tensor, signed_view
from weightline.trainer.partition import Shard
from weightline.types import BitsArray, Changes, Segment


class Baseline:
    """Holds each shard's last captured elements on the device where training holds them."""

    def __init__(self, shards: Iterable[Shard], *, ranked: bool = False) -> None:
        """Copies the shards' present elements. `ranked`: whether the coding needs ranked captures."""
        self.shards = tuple(shards)
        self._ranked = ranked
        self._held: dict[str, torch.Tensor] = {s.segment.tensor.name: s.read().clone() for s in self.shards}

    def capture(self) -> tuple[Changes, ...]:
        """Returns the changes since the last capture, by shard, and advances. Unchanged shards are left out.

        When a shard cannot be read or compared, its error is raised and the baseline is unchanged.
        """
        captured: list[Changes] = []
        try:
            for shard in self.shards:
                current = shard.read()
                held = self._held[shard.segment.tensor.name].to(current.device)
                changes = capture_tensor(shard.segment, held, current, ranked=self._ranked)
                if changes.num_changed:
                    captured.append(changes)
                    self._scatter(changes, changes.new_K)
        except BaseException:
            self.rewind(captured)
            raise
        return tuple(captured)

    def rewind(self, captured: Iterable[Changes]) -> None:
        """Undoes one capture, complete or partial. Call it for the newest capture first."""
        for changes in captured:
            self._scatter(changes, changes.old_K)

    def segments(self) -> Iterable[tuple[Segment, BitsArray]]:
        """Yields each shard's baseline bits on the host, one at a time."""
        for shard in self.shards:
            yield shard.segment, bits_of(self._held[shard.segment.tensor.name].cpu())

    def digests(self) -> dict[str, int]:
        """Returns this rank's contribution to each tensor's state digest."""
        return {segment.tensor.name: tensor_digest(segment, bits_N) for segment, bits_N in self.segments()}

    def _scatter(self, changes: Changes, bits_K: BitsArray) -> None:
        held = self._held[changes.segment.tensor.name]
        positions_K = torch.from_numpy(changes.positions_K).to(held.device)
        signed_view(held)[positions_K] = signed_tensor(bits_K).to(held.device)
