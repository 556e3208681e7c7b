"""The error tree and its codes are an interface: growing them is a decision."""

from __future__ import annotations

import pickle
from typing import Any

from weightline import errors
from weightline.errors import (
    CommitConflictError,
    ErrorKind,
    Facts,
    StorageError,
    TransientStorageError,
    WeightlineError,
)

KINDS = {
    "input", "recipe", "not-found", "chain-empty", "version-not-found", "conflict", "commit-conflict", "base-mismatch",
    "corrupt", "manifest", "payload", "digest-mismatch", "unsupported-feature", "storage", "storage-transient",
    "object-exists", "publish", "apply", "launch", "signature", "missing-extra", "rollout", "version-not-served",
}  # fmt: skip


def _tree(cls: type[WeightlineError]) -> set[type[WeightlineError]]:
    return {cls}.union(*(_tree(child) for child in cls.__subclasses__()))


def test_every_class_has_a_kind_of_its_own() -> None:
    classes = [
        cls for cls in _tree(WeightlineError) if cls.__module__ == errors.__name__ and cls is not WeightlineError
    ]
    assert sorted(cls.kind for cls in classes) == sorted(KINDS) == sorted(ErrorKind)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for cls in _tree(WeightlineError):
        if cls.__module__ == errors.__name__:
            assert cls.__name__ in errors.__doc__


def test_facts_are_attributes_and_survive_the_way_to_another_rank() -> None:
    error = CommitConflictError("another writer won", version=3, winner="ab")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.version, copy.facts) == ("another writer won", 3, {"version": 3, "winner": "ab"})
    assert copy.commit_id is None
    assert not hasattr(copy, "loser")
    assert isinstance(TransientStorageError("x"), StorageError)


def test_only_what_a_class_declares_becomes_an_attribute() -> None:
    """Facts come over the network, too: none may replace what an exception needs."""
    facts: Any = {"args": (), "kind": "other", "facts": 1, "__class__": 1, "tensor": "w"}
    error = CommitConflictError("another writer won", **facts)
    assert (str(error), error.kind, error.facts) == ("another writer won", ErrorKind.COMMIT_CONFLICT, facts)
    assert not hasattr(error, "tensor")


def test_every_attribute_of_an_error_is_a_fact() -> None:
    for cls in _tree(WeightlineError) - {WeightlineError}:
        if cls.__module__ == errors.__name__:
            assert set(cls.__annotations__) <= set(Facts.__annotations__), cls
