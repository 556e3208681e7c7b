"""What was committed and then forgotten: versions not announced, not evaluated, not offered to serving.

The bucket says what is owed, the server what is under way. An event is sent again under its own id, so that the server
keeps one; a run is started under a key, so that the server starts one, however many reconcile at once.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain as joined
from itertools import zip_longest
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

from weightline.chain import Chain, open_chain
from weightline.chain.read.records import EVALUATIONS, REFRESHES, recorded_versions, write_record
from weightline.chain.write.commit import committed_facts
from weightline.deployments.server.consumer_runs import (
    EVALUATE,
    MAX_RUNS,
    REFRESH,
    Missing,
    UnderWay,
    ended_at,
    next_step,
    read_announced,
    read_runs_of,
    read_under_way,
    url_of,
)
from weightline.deployments.server.events import announce_commit
from weightline.errors import CorruptError, NotFoundError, UnsupportedFeatureError, WeightlineError
from weightline.format.manifest import Manifest
from weightline.lineage.rows import parse_time
from weightline.runs.checks import PATIENCE_SECONDS
from weightline.runs.folder import chain_of_run, runs_dir_of

#: Chains that are looked after beside those of the runs folder: URLs with spaces between them.
CHAINS_VARIABLE = "WEIGHTLINE_CHAINS"
#: So many runs of a consumer wait or go on for all chains together; so many versions of a chain are announced at once.
MAX_STARTED = 50
#: The server forgets events after seven days; what is older is announced to nobody.
ANNOUNCED_DAYS = 6
#: Where a consumer's records are.
_KINDS = {EVALUATE: EVALUATIONS, REFRESH: REFRESHES}
_LONG_AGO = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Owed:
    """What a chain's versions lack, and what is to be done about it now."""

    unannounced: tuple[Manifest, ...]
    to_start: tuple[Missing, ...]
    exhausted: tuple[tuple[Missing, str], ...]
    """What no run has achieved, with the last word of the last."""
    unreadable: tuple[WeightlineError, ...]
    """Of versions whose manifest cannot be read: the others get what they are owed."""


def lacking_versions(
    versions: Iterable[int], evaluated: Collection[int], refreshed: Collection[int]
) -> Mapping[int, tuple[str, ...]]:
    """The versions that lack a record, with the deployments that owe it. Pure.

    One that lacks none was heard of: nothing else of it is read.
    """
    recorded = ((EVALUATE, evaluated), (REFRESH, refreshed))
    found = {version: tuple(who for who, known in recorded if version not in known) for version in versions}
    return {version: owed for version, owed in found.items() if owed}


def plan_missing(
    chain: str,
    manifests: Sequence[Manifest],
    lacking: Mapping[int, Sequence[str]],
    committed_before: datetime,
    under_way: Collection[UnderWay] = frozenset(),
) -> tuple[Missing, ...]:
    """What is owed, oldest first. Younger versions are left to their events, and what is under way to itself. Pure."""
    return tuple(
        Missing(chain, manifest.version, manifest.commit_id, deployment)
        for manifest in manifests
        if _committed_at(manifest) < committed_before
        for deployment in lacking[manifest.version]
        if (deployment, chain, manifest.version) not in under_way
    )


def plan_announcements(
    manifests: Sequence[Manifest], told: Collection[str], committed_before: datetime, committed_after: datetime
) -> tuple[Manifest, ...]:
    """Versions whose event the server does not have, oldest first. `told`: commit ids that it has. Pure."""
    unannounced = (
        manifest
        for manifest in manifests
        if committed_after < _committed_at(manifest) < committed_before and manifest.commit_id not in told
    )
    return tuple(unannounced)[:MAX_STARTED]


def sort_out(
    missing: Sequence[Missing], runs: Mapping[str, FlowRun], now: datetime
) -> tuple[tuple[Missing, ...], tuple[tuple[Missing, str], ...]]:
    """What to start a run for now, and what to give up, with the last run's word. `runs`: by key. Pure."""
    to_start: list[Missing] = []
    exhausted: list[tuple[Missing, str]] = []
    for one in missing:
        tried = [runs[key] for key in one.idempotency_keys if key in runs]
        match next_step([ended_at(run, now) for run in tried], now):
            case "start":
                to_start.append(replace(one, num_tried=len(tried)))
            case "give up":
                state = tried[-1].state
                exhausted.append((one, (state and state.message) or "it said nothing"))
    return tuple(to_start), tuple(exhausted)


def take_turns(chains: Sequence[Sequence[Missing]], under_way: Collection[UnderWay]) -> list[Missing]:
    """What to start of what all chains would: every chain has its turn, and no consumer more than it can do. Pure."""
    turns = [one for one in joined.from_iterable(zip_longest(*chains)) if one is not None]
    started: list[Missing] = []
    for deployment in (EVALUATE, REFRESH):
        room = MAX_STARTED - sum(going_on[0] == deployment for going_on in under_way)
        started += [one for one in turns if one.deployment == deployment][: max(0, room)]
    return started


@task(task_run_name="look at what is under way", cache_policy=NO_CACHE, persist_result=False)
def find_under_way() -> frozenset[UnderWay]:
    """Consumers' runs of all chains that wait or go on. Reads only."""
    with get_client(sync_client=True) as client:
        return read_under_way(client, datetime.now(UTC))


@task(task_run_name="look for what {chain} owes", cache_policy=NO_CACHE, persist_result=False)
def find_owed(chain: str, grace_seconds: float, under_way: frozenset[UnderWay] = frozenset()) -> Owed:
    """Read the bucket and the server, and plan. Reads only: three listings, and manifests that lack a record.

    A version that is announced now is left to that event; it comes up again when that did not help.
    """
    opened = open_chain(chain, patience_seconds=PATIENCE_SECONDS)
    now = datetime.now(UTC)
    before, after = now - timedelta(seconds=grace_seconds), now - timedelta(days=ANNOUNCED_DAYS)
    evaluated, refreshed = (recorded_versions(opened, kind) for kind in (EVALUATIONS, REFRESHES))
    lacking = lacking_versions(opened.versions(), evaluated, refreshed)
    manifests, unreadable = read_manifests(opened, lacking)
    with get_client(sync_client=True) as client:
        unannounced = _unannounced(client, opened.url, manifests, before, after)
        told_now = {manifest.version for manifest in unannounced}
        known = [manifest for manifest in manifests if manifest.version not in told_now]
        missing = plan_missing(opened.url, known, lacking, before, under_way)
        to_start, exhausted = sort_out(missing, read_runs_of(client, missing), now)
    return Owed(unannounced, to_start, exhausted, unreadable)


@task(task_run_name="announce v{manifest.version} again", cache_policy=NO_CACHE, persist_result=False)
def announce_again(chain: str, manifest: Manifest) -> None:
    """Send the version's event: consumers start as if it had just been committed. Safe to repeat."""
    announce_commit(chain, committed_facts(manifest))
    get_run_logger().info("announced version %d of %s", manifest.version, chain)


@task(task_run_name="start {missing.deployment} v{missing.version}", cache_policy=NO_CACHE, persist_result=False)
def start_missing(missing: Missing) -> None:
    """Start the consumer's deployment for the version. Safe to repeat: it is one run."""
    run_deployment(
        missing.deployment, parameters={"chain": missing.chain, "version": missing.version},
        idempotency_key=missing.idempotency_key, timeout=0, as_subflow=False,
    )  # fmt: skip
    get_run_logger().info("started %s for version %d of %s", missing.deployment, missing.version, missing.chain)


@task(task_run_name="give up {missing.deployment} v{missing.version}", cache_policy=NO_CACHE, persist_result=False)
def give_up(missing: Missing, why: str) -> None:
    """Write down that no run brought it about: nothing is started for it any more. Safe to repeat.

    A run that a person starts leaves its own record, which then counts.
    """
    reason = f"{MAX_RUNS} runs left no record; the last: {why}"
    told = {"status": "failed", "reason": reason, "commit_id": missing.commit_id}
    write_record(open_chain(missing.chain), _KINDS[missing.deployment], missing.version, "reconcile", told)
    get_run_logger().warning("version %d, %s: %s", missing.version, missing.deployment, reason)


def configured_chains(runs_dir: str | Path) -> list[str]:
    """The chains of WEIGHTLINE_CHAINS, then those of the runs folder, the run that was started last first."""
    named = os.environ.get(CHAINS_VARIABLE, "").split()
    return list(dict.fromkeys(url_of(chain) for chain in (*named, *chains_of_runs(runs_dir))))


def chains_of_runs(runs_dir: str | Path) -> Iterator[str]:
    """The chains of all runs, the run that was started last first. Folders that are no runs are passed over."""
    runs = sorted(runs_dir_of(runs_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        try:
            yield chain_of_run(path.parent)
        except WeightlineError:
            continue


def read_manifests(chain: Chain, versions: Iterable[int]) -> tuple[tuple[Manifest, ...], tuple[WeightlineError, ...]]:
    """The manifests of these versions, and why some cannot be read. One that has expired meanwhile is left out."""
    manifests: list[Manifest] = []
    errors: list[WeightlineError] = []
    for version in versions:
        try:
            manifests.append(chain.manifest(version))
        except NotFoundError:
            continue
        except (CorruptError, UnsupportedFeatureError) as error:
            errors.append(error)
    return tuple(manifests), tuple(errors)


def _unannounced(
    client: SyncPrefectClient, chain: str, manifests: Sequence[Manifest], before: datetime, after: datetime
) -> tuple[Manifest, ...]:
    young = [manifest for manifest in manifests if _committed_at(manifest) > after]
    return plan_announcements(young, read_announced(client, chain, young), before, after)


def _committed_at(manifest: Manifest) -> datetime:
    """By the writer's clock. What tells no time is old."""
    return parse_time(manifest.created_at) or _LONG_AGO
