"""Following: what a replica that moves by itself looks at, and how often. One short listing a look."""

from __future__ import annotations

import random
from dataclasses import dataclass

from weightline.chain import Chain
from weightline.chain.read.records import REFRESHES, Record, read_record, write_record
from weightline.chain.read.refs import newest_move
from weightline.errors import InputError
from weightline.serving.replica.status import RefreshFacts

#: The ref that stands for the newest version which passed its gate: what `refresh_serving` moves.
SERVING_REF = "serving"
#: What a replica says that it follows when it takes every version as soon as it is committed.
TIP = "tip"
_MAX_BACKOFF = 8


@dataclass(frozen=True, slots=True)
class Following:
    """Look every `interval_seconds`, give or take a fifth, so that many replicas do not ask at the same moment.

    `ref` None: every version as soon as it is committed. A name: only what that ref stands for, back as well as forth.
    """

    interval_seconds: float
    ref: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.interval_seconds <= 86400:
            raise InputError(f"a replica cannot follow every {self.interval_seconds:g} s: name 0.05 to 86400")

    @property
    def what(self) -> str:
        """`tip`, or the name of the ref."""
        return self.ref or TIP

    def wait_seconds(self, num_failures: int, draw: float | None = None) -> float:
        """How long until the next look: longer after each failure in a row, but bounded. `draw`: in [0, 1)."""
        drawn = random.random() if draw is None else draw
        backoff = min(2**num_failures, _MAX_BACKOFF)
        return self.interval_seconds * backoff * (0.8 + 0.4 * drawn)


class Follower:
    """Knows what it saw last."""

    def __init__(self, chain: Chain, following: Following) -> None:
        self._chain, self.following = chain, following
        self._number = -1
        self._target: int | None = None

    def target(self) -> int | None:
        """The version to be at; None while there is none. Reads no manifest and no payload."""
        ref = self.following.ref
        if ref is None:
            return self._chain.tip_version()
        moved = newest_move(self._chain, ref, after=self._number)
        if moved is not None:
            self._number, self._target = moved.number, moved.version
        return self._target


def record_refresh(chain: Chain, version: int, replica: str, facts: RefreshFacts) -> Record:
    """Write down that `replica` was asked for `version` and what it serves since; return the record of `version`.

    Every version below the served one that has no record of this replica yet gets one that says `skipped`, lowest first
    and before the served one's: a crash leaves a gap only above what is recorded, which the next call fills. Safe to
    repeat; the first record of a version stands, also when the replica comes back to it later.
    """
    skipped: Record = {"status": "skipped", "newer_version": facts.version}
    for passed_over in reversed(_unrecorded_below(chain, facts.version, replica)):
        write_record(chain, REFRESHES, passed_over, replica, skipped)
    served = write_record(chain, REFRESHES, facts.version, replica, done_record(facts))
    if version == facts.version:
        return served
    return read_record(chain, REFRESHES, version, replica) or write_record(chain, REFRESHES, version, replica, skipped)


def record_followed(chain: Chain, replica: str, facts: RefreshFacts) -> Record | None:
    """What a replica that moves by itself writes down: the version that it serves, and those that it passed over.

    A late joiner passed over nothing that anybody offered it. None where it did not move forward; safe to repeat.
    """
    if facts.from_version is not None and facts.from_version >= facts.version:
        return None
    skipped: Record = {"status": "skipped", "newer_version": facts.version}
    first = facts.version if facts.from_version is None else facts.from_version + 1
    for passed_over in range(first, facts.version):
        write_record(chain, REFRESHES, passed_over, replica, skipped)
    return write_record(chain, REFRESHES, facts.version, replica, done_record(facts))


def done_record(facts: RefreshFacts) -> Record:
    """What a record says of a version that is served."""
    return {"status": "done", **facts.model_dump(exclude={"version", "replica"})}


def _unrecorded_below(chain: Chain, version: int, replica: str) -> list[int]:
    """The versions below, newest first, down to the first that has a record."""
    missing: list[int] = []
    for candidate in range(version - 1, -1, -1):
        if read_record(chain, REFRESHES, candidate, replica) is not None:
            break
        missing.append(candidate)
    return missing
