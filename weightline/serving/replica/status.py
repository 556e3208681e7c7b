"""A replica's state as JSON objects: the facts of a refresh, its status, and the mark on its disk. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.errors import StorageError
from weightline.files import write_atomically

ReplicaState = Literal["serving", "loading", "waiting"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RefreshFacts(_Facts):
    """The result of one refresh. If nothing had to move, `from_version` equals `version` and the counts are 0."""

    replica: str
    version: int
    """The version that is served now; a later one than was asked for when the replica was already there."""
    commit_id: str
    from_version: int | None
    served_at: str
    """UTC, when the replica began to answer with this version."""
    pause_seconds: float
    """How long the engine stood still: withdraw the mark, write, prove, mark."""
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
    """`tip`, or the ref that it follows by itself; None: it moves on request only."""
    tip_version: int | None = None
    lag_versions: int | None = None
    lag_seconds: float | None = None
    """Age of the oldest version that it does not serve yet; 0 at the tip."""


FILE_NAME = "replica.json"


class Mark(BaseModel):
    """`checked`: the engine serves `version`. `moving`: it is between `version` (None: nothing) and `moving_to`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["checked", "moving"]
    chain: str
    replica: str
    version: int | None
    commit_id: str | None
    served_at: str | None = None
    """UTC, when requests were first answered by this version here."""
    moving_to: int | None = None

    @property
    def return_to(self) -> int | None:
        """The version to load after a restart."""
        return self.moving_to if self.version is None else self.version


def write_mark(state_dir: Path, mark: Mark) -> None:
    """Replace the mark in one rename. StorageError when the folder takes no file.

    Not fsynced, which would be most of the pause: the weights that it speaks of live in memory and do not survive a
    power cut either. After one, an old mark is as good as the new one, and none means a load from nothing.
    """
    try:
        write_atomically(state_dir / FILE_NAME, mark.model_dump_json(indent=1), is_durable=False)
    except OSError as error:
        raise StorageError(
            f"{state_dir} does not take the replica's mark: {error.strerror}. Is it writable, with room left?",
            url=str(state_dir), key=FILE_NAME,
        ) from error  # fmt: skip


def read_mark(state_dir: Path) -> Mark | None:
    """The mark; None where there is none, or one cut off by a power cut."""
    try:
        return Mark.model_validate_json((state_dir / FILE_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
