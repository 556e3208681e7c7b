"""Determines the versions that a replica moves to by itself, how often it polls, and the records that it writes."""

from __future__ import annotations

import random
from dataclasses import dataclass

from weightline.chain import Chain
from weightline.chain.read.records import REFRESHES, Record, last_recorded, read_record, write_record
from weightline.chain.read.refs import newest_move
from weightline.errors import InputError
from weightline.serving.replica.status import RefreshFacts

#: The ref that names the newest version which passed its gate: the flow `refresh-serving` moves it.
SERVING_REF = "serving"
#: The value that a replica reports as followed when it moves to every version as soon as it is committed.
TIP = "tip"
_MAX_BACKOFF = 8


@dataclass(frozen=True, slots=True)
class Following:
    """The rule by which a replica follows its chain.

    It polls every `interval_seconds`, give or take a fifth, so that many replicas do not poll at the same moment.
    With `ref` None it moves to every version as soon as it is committed; else to the version that the ref names,
    forward and backward.
    """

    interval_seconds: float
    ref: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.interval_seconds <= 86400:
            raise InputError(f"a replica cannot follow every {self.interval_seconds:g} s: name 0.05 to 86400")

    @property
    def what(self) -> str:
        """Returns `tip`, or the name of the ref."""
        return self.ref or TIP

    def wait_seconds(self, num_failures: int, draw: float | None = None) -> float:
        """Returns the seconds until the next poll: up to eight times as long after failures. `draw`: in [0, 1)."""
        drawn = random.random() if draw is None else draw
        backoff = min(2**num_failures, _MAX_BACKOFF)
        return self.interval_seconds * backoff * (0.8 + 0.4 * drawn)


class Follower:
    """Reads the version to move to. It remembers the ref's last move, so that a poll is one short listing."""

    def __init__(self, chain: Chain, following: Following) -> None:
        self._chain, self.following = chain, following
        self._number = -1
        self._target: int | None = None

    def target(self) -> int | None:
        """Returns the version to be at; None while there is none. Reads no manifest and no payload."""
        ref = self.following.ref
        if ref is None:
            return self._chain.tip_version()
        moved = newest_move(self._chain, ref, after=self._number)
        if moved is not None:
            self._number, self._target = moved.number, moved.version
        return self._target


def record_refresh(chain: Chain, version: int, replica: str, facts: RefreshFacts) -> Record:
    """Records the version that `replica` serves after a refresh to `version`; returns the record of `version`.

    The replica skipped the versions between the last one with a record of its name and the one that it serves: each
    gets a record with status `skipped`. A replica without a record is new and can have skipped only `version`.

    The lowest version is recorded first and the served one last, so that a crash leaves a gap only above the recorded
    versions, which the next call fills. Safe to repeat: the first record of a version stays, also when the replica
    returns to it later.
    """
    skipped: Record = {"status": "skipped", "newer_version": facts.version}
    if read_record(chain, REFRESHES, facts.version, replica) is None:
        last = last_recorded(chain, REFRESHES, replica, facts.version)
        for skipped_version in range(facts.version if last is None else last + 1, facts.version):
            write_record(chain, REFRESHES, skipped_version, replica, skipped)
    served = write_record(chain, REFRESHES, facts.version, replica, done_record(facts))
    return served if version == facts.version else write_record(chain, REFRESHES, version, replica, skipped)


def done_record(facts: RefreshFacts) -> Record:
    """Returns the record of a version that is served."""
    return {"status": "done", **facts.model_dump(exclude={"version", "replica"})}
