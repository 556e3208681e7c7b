"""How ranks agree, and how an error on one of them reaches the others.

The policy for errors beside training is this, and `attempt` and `best_effort` are the only broad excepts of the room:

1. What a rank does between two collectives runs in `attempt`. An `Exception` of any kind, also MemoryError or one of
   pydantic's, becomes a `Failure`, which travels in the next collective: every rank raises, none waits for the other.
2. What may be lost, such as a record or a log line, runs in `best_effort`: an error is logged and training goes on.
3. Everything else propagates. A session that is left by an error closes its groups, which cuts the connections to the
   other ranks: their next collective fails at once and not after its timeout.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from weightline.errors import PublishError, WeightlineError

_logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """An error that was caught to be told to the other ranks."""

    error: Exception

    @property
    def reason(self) -> str:
        """The error's type and message, in one line of text."""
        return f"{type(self.error).__name__}: {self.error}"

    def portable(self) -> Failure:
        """Returns the failure as other ranks can read it: errors of weightline as they are, others as PublishError."""
        if isinstance(self.error, WeightlineError):
            try:
                pickle.dumps(self.error)
                return self
            except (pickle.PicklingError, TypeError, AttributeError):
                pass
        return Failure(PublishError(self.reason, reason=self.reason))


def attempt(work: Callable[[], T]) -> T | Failure:
    """Returns what `work` returns, or the error that it raises: the first rule of this module."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return Failure(error)


def best_effort(what: str, work: Callable[[], object]) -> None:
    """Does `work`; an error is logged as a failure to do `what`: the second rule of this module."""
    done = attempt(work)
    if isinstance(done, Failure):
        _logger.warning("%s failed: %s", what, done.reason)


class RankGroup:
    """All ranks of the job, in a gloo group of their own, so that no rank ever waits in a collective of training's.

    Every method but `close` is a collective: each rank calls it, in the same order, from one thread. PublishError when
    another rank has closed its group or ended.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Collective itself. Without torch.distributed it is a group of one."""
        self.is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self.is_distributed else 0
        self.world_size = dist.get_world_size() if self.is_distributed else 1
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout) if self.is_distributed else None

    def minimum(self, value: int) -> int:
        """Returns the smallest of the ranks' values, on every rank."""
        if not self.is_distributed:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        with self._in_contact() as group:
            dist.all_reduce(box, op=dist.ReduceOp.MIN, group=group)
        return int(box.item())

    def sum_to_first(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the element-wise int64 sum over ranks; only rank 0's result counts."""
        if self.is_distributed:
            with self._in_contact() as group:
                dist.reduce(values, dst=0, op=dist.ReduceOp.SUM, group=group)
        return values

    def gather_to_first(self, value: Any) -> list[Any]:
        """Returns every rank's value in rank order on rank 0; an empty list elsewhere."""
        if not self.is_distributed:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        with self._in_contact() as group:
            dist.gather_object(value, values, dst=0, group=group)
        return values or []

    def from_first(self, value: Any) -> Any:
        """Returns rank 0's value, on every rank."""
        if not self.is_distributed:
            return value
        box = [value]
        with self._in_contact() as group:
            dist.broadcast_object_list(box, src=0, group=group)
        return box[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Does `work` on rank 0 and returns its result, or raises its error, on every rank."""
        own = attempt(work) if self.rank == 0 else None
        result = self.from_first(own.portable() if isinstance(own, Failure) else own)
        for found in (own, result):
            if isinstance(found, Failure):
                raise found.error
        agreed: T = result
        return agreed

    def on_all(self, work: Callable[[], T]) -> T:
        """Does `work` on every rank and returns its own result. When it fails on any, every rank raises."""
        own = attempt(work)
        reasons = self.gather_to_first(own.reason if isinstance(own, Failure) else None)
        failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason is not None]
        first: str | None = self.from_first(failed[0] if failed else None)
        if isinstance(own, Failure):
            raise own.error
        if first is not None:
            raise PublishError(first, reason=first)
        return own

    def close(self) -> None:
        """Cuts the connections to the other ranks. Not collective; no thread may be in a collective. Safe to repeat."""
        group, self._group = self._group, None
        if group is not None and dist.is_initialized():
            dist.destroy_process_group(group)

    @contextmanager
    def _in_contact(self) -> Iterator[dist.ProcessGroup]:
        if self._group is None:
            raise PublishError("this session is closed", reason="closed")
        try:
            yield self._group
        except RuntimeError as error:
            raise PublishError(
                f"rank {self.rank} has lost another rank, whose own error says why: {error}", reason=str(error)
            ) from error
