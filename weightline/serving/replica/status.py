"""A replica's state as JSON objects: the facts of a refresh, its status, and the mark on its disk. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.errors import StorageError, WeightlineError
from weightline.files import write_atomically

ReplicaState = Literal["serving", "loading", "waiting"]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RefreshFacts(_Facts):
    """The result of one refresh. If nothing had to move, `from_version` equals `version` and the counts are 0."""

    replica: str
    version: int
    """The version that is served now. Later than the requested one when the replica served a later one already."""
    commit_id: str
    from_version: int | None
    served_at: str
    """UTC time at which the replica began to answer with this version."""
    pause_seconds: float
    """Seconds of the pause of the engine: withdraw the mark, write, prove, mark."""
    drain_seconds: float
    """Seconds before the pause for which new requests were held back, until those in flight had ended."""
    prepare_seconds: float
    """Seconds in which the replica planned, fetched, decoded and proved the change, while the engine answered."""
    fetch_seconds: float = 0.0
    """Those of them for which it waited for payloads and checked them. 0, as the next two, when a model was loaded."""
    read_base_seconds: float = 0.0
    """Those of them in which it read the bits that the changes start from out of the engine."""
    decode_seconds: float = 0.0
    """Those of them in which it decoded the changes and proved the digests after them."""
    stage_seconds: float = 0.0
    """Seconds after the preparation in which the engine found the places of the changes, and still answered."""
    num_changed: int
    payload_nbytes: int


class ReplicaStatus(_Facts):
    """A replica's state.

    `serving`: it answers with `version`. `loading`: a refresh is under way. `waiting`: no checked version is loaded.
    """

    replica: str
    chain: str
    engine: str
    state: ReplicaState
    version: int | None
    commit_id: str | None
    served_at: str | None
    last_error: str | None
    follow_error: str | None = None
    """Why the last look for a new version failed. None after a look that succeeded."""
    lease_error: str | None = None
    """Why the lease was not renewed the last time. None after a renewal that succeeded."""
    follows: str | None = None
    """`tip`, or the ref that it follows by itself; None: it moves on request only."""
    tip_version: int | None = None
    lag_versions: int | None = None
    lag_seconds: float | None = None
    """Age of the oldest version that it does not serve yet; 0 at the tip."""
    logprobs_mode: str | None = None
    """vLLM's name for what logprobs are: `processed_logprobs` are those after temperature and top_p."""
    max_model_len: int | None = None
    """Most tokens of a prompt and its completion together."""
    has_spans: bool = False
    """Whether an answer can name the version of each of its tokens. Without it, an answer has one version."""
    rollout_routes: tuple[str, ...] = ()
    """The routes that answer with token ids and logprobs, the best one first."""
    last_refresh: RefreshFacts | None = None
    """The last refresh since the start that moved the replica."""


class ServedVersion(_Facts):
    """The version that a replica serves now, and the one that it moves to."""

    version: int | None
    commit_id: str | None
    moving_to: int | None
    last_error: str | None
    """Why the last refresh, or the last look for a new version, failed. None after one that succeeded."""


_MAX_ERROR_LENGTH = 1000


def error_text(error: Exception) -> str:
    """Returns an error as bounded text that any JSON writer takes, with its type where it is not one of ours."""
    text = str(error) if isinstance(error, WeightlineError) else f"{type(error).__name__}: {error}"
    # Half of a surrogate pair, as a manifest or file name may spell it, cannot be encoded.
    return text[:_MAX_ERROR_LENGTH].encode("utf-8", "replace").decode()


FILE_NAME = "replica.json"


class Mark(BaseModel):
    """The mark on disk. `checked`: the engine serves `version`. `moving`: it moves from `version` to `moving_to`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: Literal["checked", "moving"]
    chain: str
    replica: str
    version: int | None
    commit_id: str | None
    served_at: str | None = None
    """UTC time at which this replica began to answer with the version."""
    moving_to: int | None = None

    @property
    def return_to(self) -> int | None:
        """Returns the version to load after a restart: `version`, or `moving_to` without one."""
        return self.moving_to if self.version is None else self.version


def write_mark(state_dir: Path, mark: Mark) -> None:
    """Replaces the mark by one rename. StorageError when the folder cannot be written.

    The file is not fsynced, which would take most of the pause. The weights that it describes are in memory and do not
    survive a power cut either; after one, an old mark is as useful as the new one, and a replica without a mark loads a
    version from an anchor.
    """
    try:
        write_atomically(state_dir / FILE_NAME, mark.model_dump_json(indent=1), is_durable=False)
    except OSError as error:
        raise StorageError(
            f"the replica's mark cannot be written to {state_dir}: {error.strerror}. Check its permissions and space",
            url=str(state_dir), key=FILE_NAME,
        ) from error  # fmt: skip


def read_mark(state_dir: Path) -> Mark | None:
    """Returns the mark; None when there is none, or one that a power cut truncated."""
    try:
        return Mark.model_validate_json((state_dir / FILE_NAME).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
