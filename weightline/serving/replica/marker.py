"""The mark: a small file in a replica's state folder that says which version its weights are proven to be.

It says `moving` from before the first write of a refresh until the result is checked, so whoever reads it, after any
crash, knows either a checked version or the one to go back to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.errors import StorageError

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
    temporary = state_dir / f".{FILE_NAME}.partial"
    try:
        temporary.write_text(mark.model_dump_json(indent=1))
        temporary.replace(state_dir / FILE_NAME)
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
