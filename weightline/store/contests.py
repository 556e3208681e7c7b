"""What a store says of its commits beyond the eight verbs: how one writer wins, and where that left a doubt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from weightline.store.base import Store


@dataclass(frozen=True, slots=True)
class Contest:
    """A key about which several writers may believe different things, or that was won and never published."""

    key: str
    kind: Literal["fork", "unpublished"]
    message: str


@runtime_checkable
class Contested(Protocol):
    """A store whose writers can, in the worst case, both win; it leaves the traces."""

    def contests(self) -> tuple[Contest, ...]:
        """Every key in doubt. Reads only."""
        ...


def commit_mode(store: Store) -> str:
    """What makes `put_if_absent` exclusive: `create-only` (one request that the store honours), or the store's word."""
    return str(getattr(store, "commit_mode", "create-only"))


def contests(store: Store) -> tuple[Contest, ...]:
    """The keys in doubt, asked of the store below any wrapper; none where one request decides."""
    below: object = store
    while not isinstance(below, Contested):
        below = getattr(below, "inner", None)
        if below is None:
            return ()
    return below.contests()
