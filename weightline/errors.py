"""All errors that weightline raises, grouped by the way to handle them.

WeightlineError
|-- InputError                 an argument is invalid: change it
|   |-- RecipeError            a field of the recipe is invalid
|   `-- MissingExtraError      an optional dependency is missing: pip install 'weightline[EXTRA]'
|-- NotFoundError              the requested object does not exist
|   |-- ChainEmptyError        the chain has no version: commit a first one
|   `-- VersionNotFoundError
|-- ConflictError              another writer won: read the tip and decide
|   |-- CommitConflictError
|   |-- BaseMismatchError      the given weights are not those of the base version
|   `-- VersionNotServedError  a replica serves another version: ask another replica, or later
|-- CorruptError               stored bytes are wrong: fetch again, or rebuild from an anchor
|   |-- ManifestError
|   |-- PayloadError
|   |-- DigestMismatchError
|   `-- SignatureError         no trusted key signed the object
|-- UnsupportedFeatureError    upgrade weightline
|-- StorageError               the bucket refused or failed
|   |-- TransientStorageError  the failure may pass: retry
|   `-- ObjectExistsError      a create-only put found an existing object
|-- PublishError               the trainer could not commit a version
|-- ApplyError                 an engine could not move to a version
|-- RolloutError               no replica made the completions that training asked for
`-- LaunchError                a process started by weightline failed

`kind` is a stable, append-only code for programs. Facts are keyword arguments, checked by mypy against `Facts`; those
that a class declares are attributes of its errors, and all of them are in `error.facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import TypedDict, Unpack


class ErrorKind(StrEnum):
    """Stable codes. Append only: scripts compare them."""

    INPUT = "input"
    RECIPE = "recipe"
    NOT_FOUND = "not-found"
    CHAIN_EMPTY = "chain-empty"
    VERSION_NOT_FOUND = "version-not-found"
    CONFLICT = "conflict"
    COMMIT_CONFLICT = "commit-conflict"
    BASE_MISMATCH = "base-mismatch"
    CORRUPT = "corrupt"
    MANIFEST = "manifest"
    PAYLOAD = "payload"
    DIGEST_MISMATCH = "digest-mismatch"
    UNSUPPORTED_FEATURE = "unsupported-feature"
    STORAGE = "storage"
    STORAGE_TRANSIENT = "storage-transient"
    OBJECT_EXISTS = "object-exists"
    PUBLISH = "publish"
    APPLY = "apply"
    LAUNCH = "launch"
    SIGNATURE = "signature"
    MISSING_EXTRA = "missing-extra"
    ROLLOUT = "rollout"
    VERSION_NOT_SERVED = "version-not-served"


class Facts(TypedDict, total=False):
    """The facts of an error besides its message, as values that JSON can hold."""

    # Arguments of the caller.
    field: str
    remedy: str
    name: str
    path: str
    missing: str
    variable: str
    profile: str
    package: str
    state_dir: str
    step_observer: str
    checkpoint: str
    ranks: int | None
    adapters: Sequence[str]
    host: str
    port: int
    modules: Sequence[str]
    extras: Sequence[str]
    # Buckets and chains.
    url: str
    key: str | None
    keys: Sequence[str]
    status: int
    chain: str
    version: int | None
    versions: tuple[int, int]
    tip: int | None
    commit_id: str
    winner: str
    key_id: str
    key_ids: Sequence[str]
    # Tensors and bytes.
    rule: str
    feature: str
    file: str
    what: str
    tensor: str
    expected: object
    actual: object
    digest: str
    dtype: str
    device: str
    nbytes: int
    full_nbytes: int
    # Engines and processes.
    engine: str
    is_unreachable: bool
    num_in_flight: int
    parameter: str
    layer: str
    attribute: str
    position: int
    quantization: str
    reason: str
    rank: int
    argv: Sequence[str]
    returncode: int | None
    tail: Sequence[str]
    state: str
    # Rollouts.
    replicas: Sequence[str]


class WeightlineError(Exception):
    """Base class of all errors of weightline."""

    kind: ErrorKind = ErrorKind.INPUT
    facts: Facts
    """The facts of this error, by name."""

    def __init__(self, message: str, **facts: Unpack[Facts]) -> None:
        super().__init__(message)
        self.facts = facts
        for name, value in facts.items():
            if name in Facts.__annotations__ and hasattr(type(self), name):  # the class declares it
                setattr(self, name, value)


class InputError(WeightlineError):
    """An argument of the caller is invalid."""

    kind = ErrorKind.INPUT
    field: str | None = None


class RecipeError(InputError):
    """A field of a recipe is unknown, missing or out of range."""

    kind = ErrorKind.RECIPE
    remedy: str | None = None


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    kind = ErrorKind.MISSING_EXTRA
    modules: Sequence[str] = ()
    extras: Sequence[str] = ()


class NotFoundError(WeightlineError):
    """A named object is not in the bucket."""

    kind = ErrorKind.NOT_FOUND
    key: str | None = None


class ChainEmptyError(NotFoundError):
    """The bucket holds no version yet."""

    kind = ErrorKind.CHAIN_EMPTY
    chain: str | None = None


class VersionNotFoundError(NotFoundError):
    """The chain has no such version."""

    kind = ErrorKind.VERSION_NOT_FOUND
    chain: str | None = None
    version: int | None = None


class ConflictError(WeightlineError):
    """Another writer was first."""

    kind = ErrorKind.CONFLICT


class CommitConflictError(ConflictError):
    """Another writer committed this version."""

    kind = ErrorKind.COMMIT_CONFLICT
    version: int | None = None
    commit_id: str | None = None
    winner: str | None = None


class BaseMismatchError(ConflictError):
    """The given weights are not those of the base version."""

    kind = ErrorKind.BASE_MISMATCH
    tensor: str | None = None
    version: int | None = None
    expected: object = None
    actual: object = None


class VersionNotServedError(ConflictError):
    """A replica does not serve the version that a request asks for. `version` is the one that it serves, if any."""

    kind = ErrorKind.VERSION_NOT_SERVED
    version: int | None = None


class CorruptError(WeightlineError):
    """Stored bytes differ from the bytes that were written."""

    kind = ErrorKind.CORRUPT


class ManifestError(CorruptError):
    """A manifest breaks a rule of the format."""

    kind = ErrorKind.MANIFEST
    rule: str | None = None


class PayloadError(CorruptError):
    """A payload breaks a rule of the format."""

    kind = ErrorKind.PAYLOAD
    rule: str | None = None


class DigestMismatchError(CorruptError):
    """A digest differs from the recorded one."""

    kind = ErrorKind.DIGEST_MISMATCH
    what: str | None = None
    version: int | None = None
    expected: object = None
    actual: object = None


class SignatureError(CorruptError):
    """No trusted key signed an object's present bytes."""

    kind = ErrorKind.SIGNATURE
    key: str | None = None


class UnsupportedFeatureError(WeightlineError):
    """The bytes use a feature that this release does not support."""

    kind = ErrorKind.UNSUPPORTED_FEATURE
    feature: str | None = None


class StorageError(WeightlineError):
    """The bucket refused an operation, or failed permanently."""

    kind = ErrorKind.STORAGE
    url: str | None = None
    key: str | None = None


class TransientStorageError(StorageError):
    """The bucket failed in a way that may pass: retry later."""

    kind = ErrorKind.STORAGE_TRANSIENT


class ObjectExistsError(StorageError):
    """A create-only put found an existing object."""

    kind = ErrorKind.OBJECT_EXISTS


class PublishError(WeightlineError):
    """The trainer could not commit a version."""

    kind = ErrorKind.PUBLISH
    version: int | None = None
    rank: int | None = None
    reason: str | None = None


class ApplyError(WeightlineError):
    """An engine could not move to a version."""

    kind = ErrorKind.APPLY
    version: int | None = None
    engine: str | None = None
    is_unreachable: bool = False


class RolloutError(WeightlineError):
    """No replica made the completions that training asked for, within the deadline."""

    kind = ErrorKind.ROLLOUT
    version: int | None = None
    """The version that a replica had to have."""
    replicas: Sequence[str] = ()
    """Each replica with the version that it serves, and why it could not answer."""


class LaunchError(WeightlineError):
    """A process that weightline started failed."""

    kind = ErrorKind.LAUNCH
    argv: Sequence[str] = ()
    returncode: int | None = None
    tail: Sequence[str] = ()


#: Status codes over HTTP. The first class that an error belongs to decides.
_HTTP_STATUS: tuple[tuple[type[WeightlineError], int], ...] = (
    (InputError, 400),
    (NotFoundError, 404),
    (ConflictError, 409),
    (UnsupportedFeatureError, 501),
    (CorruptError, 502),
    (TransientStorageError, 503),
    (StorageError, 502),
    (ApplyError, 503),
)


def http_status(error: WeightlineError) -> int:
    """Returns the HTTP status with which weightline's servers answer an error; 500 for all other classes."""
    return next((status for cls, status in _HTTP_STATUS if isinstance(error, cls)), 500)
