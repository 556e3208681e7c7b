"""Records of refreshes: for every version, that a replica served it or passed over it."""

from __future__ import annotations

from weightline.chain import Chain
from weightline.chain.read.records import REFRESHES, Record, read_record, write_record
from weightline.serving.replica.facts import RefreshFacts


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
