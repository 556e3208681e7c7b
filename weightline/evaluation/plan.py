"""Plans which versions are evaluated: the newest and all milestones. All others are recorded as skipped. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weightline.chain.read.records import Record
from weightline.errors import VersionNotFoundError
from weightline.format.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Measure this version now."""

    version: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Record that the version was skipped, since a newer one was committed before its evaluation began."""

    version: int
    newer_version: int


@dataclass(frozen=True, slots=True)
class Done:
    """The version has a record; there is nothing to do."""

    version: int
    record: Record


EvaluationPlan = Evaluate | Skip | Done


def plan_evaluation(manifests: Sequence[Manifest], records: Iterable[Record], requested: int) -> EvaluationPlan:
    """Returns the action for a request to evaluate `requested`, given the chain and the records of one task.

    A version with any record is done. A milestone is always evaluated. Any other version is skipped when the chain has
    a newer one, which is announced and planned by its own request. VersionNotFoundError for a version that is not among
    the manifests.
    """
    by_version = {manifest.version: manifest for manifest in manifests}
    if requested not in by_version:
        raise VersionNotFoundError(f"version {requested} is not in the chain", version=requested)
    recorded = {record["version"]: record for record in records}
    if requested in recorded:
        return Done(requested, recorded[requested])
    newest = max(by_version)
    if by_version[requested].is_milestone or requested == newest:
        return Evaluate(requested)
    return Skip(requested, newest)
