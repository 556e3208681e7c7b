"""Finds the versions that lack an evaluation or refresh record, and plans the runs that make them.

All functions but `read_manifests` are pure. Every commit starts two consumers by an event, and each writes a record of
its kind. An event or a run can be lost, so `reconcile` compares the records in the bucket with the runs on the Prefect
server, which are waiting, running or ended:

- a version whose event the server does not have is announced again, under the event's own id;
- a missing record without a run gets a new run: after 5, 10, 20, ... minutes, and at most `MAX_ATTEMPTS` times;
- a missing record whose runs have all failed is exhausted: a record `failed` is written in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain as joined
from itertools import zip_longest
from typing import Literal, NamedTuple

from weightline.chain import Chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES
from weightline.errors import CorruptError, NotFoundError, UnsupportedFeatureError, WeightlineError
from weightline.format.manifest import Header, parse_time

#: Runs for one record. With the default pause the last starts two and a half hours after the first.
MAX_ATTEMPTS = 6
#: Pause after the first run that left no record. It doubles with every further one.
RETRY_SECONDS = 300.0
#: Bound of the runs of one kind that wait or run, over all chains, and of a chain's versions announced at once.
MAX_STARTED = 50
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class MissingRecord:
    """A record that a version lacks. `kind` is EVALUATIONS or REFRESHES."""

    chain: str
    version: int
    commit_id: str
    kind: str
    num_attempts: int = 0
    """Runs that were started for it and have ended."""


class ConsumerRun(NamedTuple):
    """A consumer's run that is waiting or running, identified by the record that it will write."""

    kind: str
    chain: str
    version: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run that was started for a missing record. `ended_at` is None while it is waiting or running."""

    ended_at: datetime | None
    message: str


@dataclass(frozen=True, slots=True)
class ExhaustedRecord:
    """A missing record whose attempts are used up, with the message of the last one."""

    missing: MissingRecord
    last_message: str


@dataclass(frozen=True, slots=True)
class Owed:
    """The actions of one run of `reconcile` for the missing records of one chain."""

    unannounced: tuple[Header, ...]
    """Versions whose event is sent again."""
    to_start: tuple[MissingRecord, ...]
    """Records for which a run may be started."""
    exhausted: tuple[ExhaustedRecord, ...]
    """Records that are given up."""
    unreadable: tuple[WeightlineError, ...]
    """Errors of manifests that cannot be read. The other versions are processed nevertheless."""


def lacking_versions(
    versions: Iterable[int], evaluated: Collection[int], refreshed: Collection[int]
) -> Mapping[int, tuple[str, ...]]:
    """Returns the versions that lack a record, with the kinds of record that they lack.

    A version that lacks none is left out, and so its manifest is never read.
    """
    recorded = ((EVALUATIONS, evaluated), (REFRESHES, refreshed))
    found = {version: tuple(kind for kind, known in recorded if version not in known) for version in versions}
    return {version: kinds for version, kinds in found.items() if kinds}


def plan_missing(
    chain: str,
    manifests: Sequence[Header],
    lacking: Mapping[int, Sequence[str]],
    committed_before: datetime,
    under_way: Collection[ConsumerRun] = frozenset(),
) -> tuple[MissingRecord, ...]:
    """Returns the missing records, oldest version first.

    Versions committed after `committed_before` are left out, since their events may still arrive, and so are records
    for which a run is under way.
    """
    return tuple(
        MissingRecord(chain, manifest.version, manifest.commit_id, kind)
        for manifest in manifests
        if committed_at(manifest) < committed_before
        for kind in lacking[manifest.version]
        if ConsumerRun(kind, chain, manifest.version) not in under_way
    )


def plan_announcements(
    manifests: Sequence[Header], announced: Collection[str], committed_before: datetime, committed_after: datetime
) -> tuple[Header, ...]:
    """Returns the versions whose event the server lacks, oldest first. `announced`: commit ids of those that it has."""
    unannounced = (
        manifest
        for manifest in manifests
        if committed_after < committed_at(manifest) < committed_before and manifest.commit_id not in announced
    )
    return tuple(unannounced)[:MAX_STARTED]


def next_step(
    ends: Sequence[datetime | None], now: datetime, retry_seconds: float = RETRY_SECONDS
) -> Literal["start", "wait", "give up"]:
    """Returns the next step for one missing record. `ends`: when its runs ended, oldest first; None: still running."""
    if not ends:
        return "start"
    last = ends[-1]
    if last is None or now < last + timedelta(seconds=retry_seconds * 2 ** (len(ends) - 1)):
        return "wait"
    return "start" if len(ends) < MAX_ATTEMPTS else "give up"


def plan_runs(
    missing: Sequence[MissingRecord],
    attempts: Mapping[MissingRecord, Sequence[Attempt]],
    now: datetime,
    retry_seconds: float = RETRY_SECONDS,
) -> tuple[tuple[MissingRecord, ...], tuple[ExhaustedRecord, ...]]:
    """Splits missing records into those for which a run is started now and those that are given up; others wait."""
    to_start: list[MissingRecord] = []
    exhausted: list[ExhaustedRecord] = []
    for record in missing:
        tried = attempts.get(record, ())
        match next_step([attempt.ended_at for attempt in tried], now, retry_seconds):
            case "start":
                to_start.append(replace(record, num_attempts=len(tried)))
            case "give up":
                exhausted.append(ExhaustedRecord(record, tried[-1].message))
    return tuple(to_start), tuple(exhausted)


def take_turns(
    chains: Sequence[Sequence[MissingRecord]], under_way: Collection[ConsumerRun]
) -> tuple[MissingRecord, ...]:
    """Returns the records for which runs are started, taken in turn from each chain.

    With the runs of `under_way`, which wait or run already, there are at most `MAX_STARTED` runs of each kind.
    """
    turns = [record for record in joined.from_iterable(zip_longest(*chains)) if record is not None]
    started: list[MissingRecord] = []
    for kind in (EVALUATIONS, REFRESHES):
        room = MAX_STARTED - sum(run.kind == kind for run in under_way)
        started += [record for record in turns if record.kind == kind][: max(0, room)]
    return tuple(started)


def committed_at(manifest: Header) -> datetime:
    """Returns when the version was committed, by the writer's clock. A manifest without a time counts as old."""
    return parse_time(manifest.created_at) or _LONG_AGO


def read_manifests(chain: Chain, versions: Iterable[int]) -> tuple[tuple[Header, ...], tuple[WeightlineError, ...]]:
    """Reads the manifests of these versions. Returns them and the errors of those that cannot be read.

    A version that has expired in the meantime is left out.
    """
    manifests: list[Header] = []
    errors: list[WeightlineError] = []
    for version in versions:
        try:
            manifests.append(chain.header(version))
        except NotFoundError:
            continue
        except (CorruptError, UnsupportedFeatureError) as error:
            errors.append(error)
    return tuple(manifests), tuple(errors)
