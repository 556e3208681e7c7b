"""Every error that weightline raises, grouped by what a handler would do about it.

WeightlineError
|-- InputError                 change what you passed
|   |-- RecipeError            ... a field of the recipe
|   `-- MissingExtraError      ... or install what is missing: pip install 'weightline[EXTRA]'
|-- NotFoundError              ask for something that exists
|   |-- ChainEmptyError        ... commit a first version
|   `-- VersionNotFoundError
|-- ConflictError              somebody else won: read the tip and decide
|   |-- CommitConflictError
|   `-- BaseMismatchError      ... the weights at hand are not those of the base version
|-- CorruptError               bytes are wrong: fetch again, or rebuild from an anchor
|   |-- ManifestError
|   |-- PayloadError
|   |-- DigestMismatchError
|   `-- SignatureError         ... or written by somebody whom you do not trust
|-- UnsupportedFeatureError    upgrade weightline
|-- StorageError               the bucket did not do what it was asked
|   |-- TransientStorageError  ... ask again
|   `-- ObjectExistsError      ... a create-only put met an object
|-- PublishError               a version could not be committed by the trainer
|-- ApplyError                 an engine could not move: it stays, or goes back
`-- LaunchError                a process of ours ended badly

`kind` is a stable, append-only code for programs; the facts are attributes (`error.facts`).
"""

from __future__ import annotations

from enum import StrEnum


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


class WeightlineError(Exception):
    """Root of the tree. `facts` holds what was wrong, by name."""

    kind: ErrorKind = ErrorKind.INPUT

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts

    def __getattr__(self, name: str) -> object:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


class InputError(WeightlineError):
    """The caller passed something that cannot be used."""

    kind = ErrorKind.INPUT


class RecipeError(InputError):
    """A field of a recipe is unknown, missing or out of range. Facts: `field`, `remedy`."""

    kind = ErrorKind.RECIPE


class MissingExtraError(InputError):
    """An optional dependency is not installed. Facts: `modules`, `extras`."""

    kind = ErrorKind.MISSING_EXTRA


class NotFoundError(WeightlineError):
    """A named object is not in the bucket. Facts: `key`."""

    kind = ErrorKind.NOT_FOUND


class ChainEmptyError(NotFoundError):
    """The bucket holds no version yet. Facts: `chain`."""

    kind = ErrorKind.CHAIN_EMPTY


class VersionNotFoundError(NotFoundError):
    """The chain has no such version. Facts: `chain`, `version`, `tip`."""

    kind = ErrorKind.VERSION_NOT_FOUND


class ConflictError(WeightlineError):
    """Another writer was there first."""

    kind = ErrorKind.CONFLICT


class CommitConflictError(ConflictError):
    """Another writer committed this version. Facts: `version`, `commit_id`, `winner`."""

    kind = ErrorKind.COMMIT_CONFLICT


class BaseMismatchError(ConflictError):
    """The weights at hand are not those of the base version. Facts: `tensor`, `version`, `expected`, `actual`."""

    kind = ErrorKind.BASE_MISMATCH


class CorruptError(WeightlineError):
    """Stored bytes are not what was written."""

    kind = ErrorKind.CORRUPT


class ManifestError(CorruptError):
    """A manifest breaks a rule of the format. Facts: `rule`."""

    kind = ErrorKind.MANIFEST


class PayloadError(CorruptError):
    """A payload breaks a rule of the format. Facts: `rule`."""

    kind = ErrorKind.PAYLOAD


class DigestMismatchError(CorruptError):
    """A digest differs from the recorded one. Facts: `what`, `expected`, `actual`."""

    kind = ErrorKind.DIGEST_MISMATCH


class SignatureError(CorruptError):
    """No trusted key signed an object as it is. Facts: `key`, `key_ids` or `key_id`."""

    kind = ErrorKind.SIGNATURE


class UnsupportedFeatureError(WeightlineError):
    """The bytes use a feature that this release does not know. Facts: `feature`."""

    kind = ErrorKind.UNSUPPORTED_FEATURE


class StorageError(WeightlineError):
    """The bucket refused or failed for good. Facts: `url`, `key`."""

    kind = ErrorKind.STORAGE


class TransientStorageError(StorageError):
    """The bucket failed in a way that may pass: ask again."""

    kind = ErrorKind.STORAGE_TRANSIENT


class ObjectExistsError(StorageError):
    """A create-only put met an object. Facts: `key`."""

    kind = ErrorKind.OBJECT_EXISTS


class PublishError(WeightlineError):
    """The trainer could not commit a version. Facts: `version`, `rank`, `reason`."""

    kind = ErrorKind.PUBLISH


class ApplyError(WeightlineError):
    """An engine could not move to a version. Facts: `version`, `engine`."""

    kind = ErrorKind.APPLY


class LaunchError(WeightlineError):
    """A process that we started ended badly. Facts: `argv`, `returncode`, `tail`."""

    kind = ErrorKind.LAUNCH
