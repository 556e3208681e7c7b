"""What a replica tells the world, as JSON objects. Free of torch, so that clients can parse it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

ReplicaState = Literal["serving", "loading", "waiting"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RefreshFacts(_Facts):
    """One refresh. Where nothing had to move, `from_version` equals `version` and the counts are 0."""

    replica: str
    version: int
    """The version that is served now; a later one than was asked for when the replica was already there."""
    commit_id: str
    from_version: int | None
    served_at: str
    """UTC, when the replica began to answer with this version."""
    pause_seconds: float
    """How long the engine stood still: withdraw the mark, scatter, check, mark."""
    drain_seconds: float
    """How long requests were held back before that, until those under way had ended."""
    prepare_seconds: float
    num_changed: int
    payload_nbytes: int


class ReplicaStatus(_Facts):
    """`serving`: answers with `version`. `loading`: a refresh is under way. `waiting`: no checked version is loaded."""

    replica: str
    chain: str
    engine: str
    state: ReplicaState
    version: int | None
    commit_id: str | None
    served_at: str | None
    last_error: str | None
    follows: str | None = None
    """`tip`, or the ref that it follows by itself; None: it moves when it is told."""
    tip_version: int | None = None
    lag_versions: int | None = None
    lag_seconds: float | None = None
    """Age of the oldest version that it does not serve yet; 0 at the tip."""
