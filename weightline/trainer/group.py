"""How ranks agree: a gloo group apart from training's, so that neither ever waits in the other's collective."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class RankGroup:
    """All ranks of the job. Every method is a collective: each rank calls it, in the same order, from one thread."""

    def __init__(self, timeout_seconds: float) -> None:
        """Collective itself. Without torch.distributed it is a group of one."""
        self.is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.is_distributed else 0
        self.world_size = dist.get_world_size() if self.is_distributed else 1
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.is_distributed else None

    def minimum(self, value: int) -> int:
        """The smallest of the ranks' values, on every rank."""
        if not self.is_distributed:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MIN, group=self._group)
        return int(box.item())

    def sum_to_first(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise int64 sum over ranks; only rank 0's result counts."""
        if self.is_distributed:
            dist.reduce(values, dst=0, op=dist.ReduceOp.SUM, group=self._group)
        return values

    def gather_to_first(self, value: Any) -> list[Any]:
        """Every rank's value in rank order on rank 0; an empty list elsewhere."""
        if not self.is_distributed:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if not self.is_distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
