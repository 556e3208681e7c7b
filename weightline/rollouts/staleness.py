"""The age of a sample in versions, and the rule that bounds it. Numbers only.

A run that resumes behind the chain's tip commits a revert first: history stays linear, and the versions between the
revert and the one that it stands for are no ancestors of what training computes from then on.

    version     0  1  2  3  4  5  6     with version 5 a revert to version 2:
    lineage     0--1--2           5--6  3 and 4 were reverted away; 5 holds the weights of 2, so that 2 and 5 have
    age at 6    3  2  1  -  -  1  0     the same age
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weightline.errors import InputError
from weightline.rollouts.sample import Sample


@dataclass(frozen=True, slots=True)
class Lineage:
    """The versions that the newest one descends from: all before it, except for those that were reverted away."""

    start_version: int = 0
    """The version that this process began to train at: replicas are asked for no earlier one."""
    reverts: tuple[tuple[int, int], ...] = ()
    """Each revert of the run with the version that it stands for, oldest first."""

    def __post_init__(self) -> None:
        versions = [version for version, _ in self.reverts]
        if versions != sorted(set(versions)) or any(not 0 <= stands < version for version, stands in self.reverts):
            raise InputError(f"a lineage cannot have the reverts {self.reverts}", field="reverts")

    def started_at(self, version: int, stands_for: int | None = None) -> Lineage:
        """Returns the lineage of a process that begins to train at a version, after this one.

        `stands_for` is the version that it reverts to, if it is a revert.
        """
        known = tuple(revert for revert in self.reverts if revert[0] < version)
        own = () if stands_for is None else ((version, stands_for),)
        return Lineage(version, known + own)

    def age(self, version: int, newest: int) -> int | None:
        """Returns how many versions a version is behind the newest; None when it was reverted away, or is later."""
        age, at = 0, newest
        for revert, stands_for in reversed(self.reverts):
            if revert > at:
                continue
            if version >= revert:
                break
            age, at = age + at - revert, stands_for
        return age + at - version if version <= at else None

    def to_json(self) -> dict[str, object]:
        """Returns the lineage as JSON values."""
        return {"start_version": self.start_version, "reverts": [list(revert) for revert in self.reverts]}

    @classmethod
    def from_json(cls, body: dict[str, object]) -> Lineage:
        """Returns the lineage that `to_json` wrote. InputError for any other object."""
        match body:
            case {"start_version": int(start), "reverts": [*reverts]}:
                return cls(start, tuple(_pair(revert) for revert in reverts))
        raise InputError(f"this is no lineage: {body!r}", field="lineage")


def _pair(body: object) -> tuple[int, int]:
    match body:
        case [int(version), int(stands_for)]:
            return version, stands_for
    raise InputError(f"this is no revert of a lineage: {body!r}", field="lineage")


@dataclass(frozen=True, slots=True)
class StalenessRule:
    """Which samples may be trained on. InputError for a negative number.

    A sample's staleness is the age, at the moment it is trained on, of the oldest version that wrote one of its tokens.
    """

    lookahead: int
    """Generation batches that are asked for before they are needed."""
    staleness: int
    """The greatest staleness of a sample that is trained on. 0 is on-policy training."""

    def __post_init__(self) -> None:
        for name in ("lookahead", "staleness"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}: name 0 or more", field=name)

    def min_version(self, newest_at_use: int, lineage: Lineage) -> int:
        """Returns the version that a replica must have to make a batch which is trained on at `newest_at_use`.

        Never one from before the start of this process: a replica that still holds a later version of a run that was
        killed is not asked.
        """
        return max(lineage.start_version, newest_at_use - self.staleness)

    def is_fresh(self, sample: Sample, newest: int, lineage: Lineage) -> bool:
        """Returns whether the sample may be trained on while `newest` is the newest version."""
        age = staleness_of(sample, newest, lineage)
        return age is not None and age <= self.staleness


def staleness_of(sample: Sample, newest: int, lineage: Lineage) -> int | None:
    """Returns the sample's staleness; None when a version that was reverted away wrote one of its tokens."""
    return greatest_age(sample.versions, newest, lineage)


def greatest_age(versions: Iterable[int], newest: int, lineage: Lineage) -> int | None:
    """Returns the age of the oldest of the versions, 0 without any; None when one of them was reverted away."""
    greatest = 0
    for version in versions:
        age = lineage.age(version, newest)
        if age is None:
            return None
        greatest = max(greatest, age)
    return greatest
