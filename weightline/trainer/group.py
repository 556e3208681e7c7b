"""Collectives of all ranks, which also carry the errors of one rank to the others.

Policy for errors during training; `attempt` and `best_effort` contain the only broad excepts of this package:

1. The work of a rank between two collectives runs in `attempt`. An `Exception` of any kind, including MemoryError and
   those of pydantic, becomes a `Failure`, which the next collective carries: every rank raises, and none blocks.
2. Work whose result is dispensable, such as a record or a log line, runs in `best_effort`: an error is logged and
   training continues.
3. All other errors propagate. They close the session and its groups, which cuts the connections to the other ranks:
   their next collective fails at once instead of after its timeout.
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
    """An error that was caught so that a collective can carry it to the other ranks."""

    error: Exception

    @property
    def reason(self) -> str:
        """Returns the error's type and message, as `Type: message`."""
        return f"{type(self.error).__name__}: {self.error}"

    def portable(self) -> Failure:
        """Returns the failure in a form that can be pickled: errors of weightline unchanged, others as PublishError."""
        if isinstance(self.error, WeightlineError):
            try:
                pickle.dumps(self.error)
                return self
            except (pickle.PicklingError, TypeError, AttributeError):
                pass
        return Failure(PublishError(self.reason, reason=self.reason))


def attempt(work: Callable[[], T]) -> T | Failure:
    """Returns the result of `work`, or its error as a `Failure`: the first rule of this module."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001
        return Failure(error)


def best_effort(what: str, work: Callable[[], object]) -> None:
    """Runs `work` and logs an error as a failure of `what`: the second rule of this module."""
    done = attempt(work)
    if isinstance(done, Failure):
        _logger.warning("%s failed: %s", what, done.reason)


class RankGroup:
    """All ranks of the job, in a gloo group of their own, separate from the collectives of training.

    Every method but `close` is a collective: each rank calls it, in the same order, from one thread. PublishError when
    another rank has closed its group or ended.
    """

    def __init__(self, timeout_seconds: float) -> None:
        """Creates the group. Collective. Without torch.distributed it is a group of one rank."""
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
        """Returns the element-wise int64 sum over ranks. The result is valid on rank 0 only."""
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
        """Runs `work` on rank 0 and returns its result, or raises its error, on every rank."""
        own = attempt(work) if self.rank == 0 else None
        result = self.from_first(own.portable() if isinstance(own, Failure) else own)
        for found in (own, result):
            if isinstance(found, Failure):
                raise found.error
        agreed: T = result
        return agreed

    def on_all(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns this rank's result. When it fails on any rank, every rank raises."""
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
                f"rank {self.rank} has lost its connection to another rank, whose output shows the cause: {error}",
                reason=str(error),
            ) from error
