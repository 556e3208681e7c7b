"""What was committed and then forgotten: versions not announced, not evaluated, not offered to serving.

The bucket says what is owed, the server what is under way. An event is sent again under its own id, so that the server
keeps one; a run is started under a key, so that the server starts one, however many reconcile at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments import run_deployment

from tasks.publish import announce_commit, event_id
from tasks.run_folder import chain_of_run, runs_dir_of
from weightline.chain import open_chain
from weightline.chain.records import EVALUATIONS, REFRESHES, Record, read_records
from weightline.errors import WeightlineError
from weightline.format.manifest import Manifest

EVALUATE = "evaluate-version/evaluate-version"
REFRESH = "refresh-serving/refresh-serving"
#: Chains that are looked after beside those of the runs folder: URLs with spaces between them.
CHAINS_VARIABLE = "WEIGHTLINE_CHAINS"
#: A run that was started for a version and crashed is started again in the next window, and not before.
WINDOW_SECONDS = 300
MAX_STARTED = 50
#: The server forgets events after seven days; what is older is announced to nobody.
ANNOUNCED_DAYS = 6
_UNDER_WAY = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
_MAX_READ = 200
#: A consumer's run that takes longer is taken for dead.
_MAX_SECONDS = 3600.0
_MAX_EVENTS = 50


@dataclass(frozen=True, slots=True)
class Missing:
    """A version that a consumer owes a record."""

    version: int
    commit_id: str
    deployment: str

    def idempotency_key(self, now_seconds: float) -> str:
        """The same within a window, however many reconcile at once: the server starts one run for it."""
        return f"{self.deployment}:{self.commit_id}:{int(now_seconds // WINDOW_SECONDS)}"


@dataclass(frozen=True, slots=True)
class Owed:
    """What a chain's versions lack."""

    unannounced: tuple[Manifest, ...]
    missing: tuple[Missing, ...]

    @property
    def num_owed(self) -> int:
        return len(self.unannounced) + len(self.missing)


def plan_reconcile(
    manifests: Sequence[Manifest],
    evaluations: Iterable[Record],
    refreshes: Iterable[Record],
    committed_before: datetime,
    max_started: int = MAX_STARTED,
    under_way: Collection[tuple[str, int]] = frozenset(),
) -> tuple[Missing, ...]:
    """What to start, oldest first, at most `max_started`. Younger versions are left to their events. Pure.

    `under_way`: deployments and versions for which a run waits or goes on already.
    """
    evaluated, refreshed = ({record["version"] for record in records} for records in (evaluations, refreshes))
    missing = [
        Missing(manifest.version, manifest.commit_id, deployment)
        for manifest in manifests
        if datetime.fromisoformat(manifest.created_at) < committed_before
        for deployment, recorded in ((EVALUATE, evaluated), (REFRESH, refreshed))
        if manifest.version not in recorded and (deployment, manifest.version) not in under_way
    ]
    return tuple(missing[:max_started])


def plan_announcements(
    manifests: Sequence[Manifest], told: Collection[str], committed_before: datetime, committed_after: datetime
) -> tuple[Manifest, ...]:
    """Versions whose event the server does not have, oldest first. `told`: commit ids that it has. Pure."""
    unannounced = (
        manifest
        for manifest in manifests
        if committed_after < datetime.fromisoformat(manifest.created_at) < committed_before
        and manifest.commit_id not in told
    )
    return tuple(unannounced)[:MAX_STARTED]


@task(task_run_name="look for what {chain} owes", cache_policy=NO_CACHE, persist_result=False)
def find_owed(chain: str, grace_seconds: float) -> Owed:
    """Read the bucket and the server, and plan. Reads only.

    A version that is announced now is left to that event; it comes up again when that did not help.
    """
    opened = open_chain(chain)
    now = datetime.now(UTC)
    before, after = now - timedelta(seconds=grace_seconds), now - timedelta(days=ANNOUNCED_DAYS)
    evaluations, refreshes = (read_records(opened, kind) for kind in (EVALUATIONS, REFRESHES))
    manifests = opened.manifests()
    with get_client(sync_client=True) as client:
        young = [m for m in manifests if datetime.fromisoformat(m.created_at) > after]
        unannounced = plan_announcements(young, _announced(client, chain, young), before, after)
        under_way = _under_way(client, chain)
    told_now = {manifest.version for manifest in unannounced}
    known = [manifest for manifest in manifests if manifest.version not in told_now]
    return Owed(unannounced, plan_reconcile(known, evaluations, refreshes, before, under_way=under_way))


@task(task_run_name="announce v{manifest.version} again", cache_policy=NO_CACHE, persist_result=False)
def announce_again(chain: str, manifest: Manifest) -> None:
    """Send the version's event: consumers start as if it had just been committed. Safe to repeat."""
    facts = manifest.model_dump(
        include={
            "version", "commit_id", "kind", "stage", "run_id", "global_step", "is_milestone", "num_changed",
            "num_elements", "payload_nbytes", "full_nbytes",
        }
    )  # fmt: skip
    announce_commit(chain, facts)
    get_run_logger().info("announced version %d of %s", manifest.version, chain)


@task(task_run_name="start {missing.deployment} v{missing.version}", cache_policy=NO_CACHE, persist_result=False)
def start_missing(chain: str, missing: Missing) -> None:
    """Start the consumer's deployment for the version. Safe to repeat: the same run within a window."""
    parameters = {"chain": chain, "version": missing.version}
    key = missing.idempotency_key(time.time())
    run_deployment(missing.deployment, parameters=parameters, idempotency_key=key, timeout=0, as_subflow=False)
    get_run_logger().info("started %s for version %d of %s", missing.deployment, missing.version, chain)


def configured_chains(runs_dir: str | Path) -> tuple[list[str], list[str]]:
    """The chains of WEIGHTLINE_CHAINS, and those of the runs folder, the run that was started last first."""
    named = os.environ.get(CHAINS_VARIABLE, "").split()
    of_runs = (chain for chain in chains_of_runs(runs_dir) if chain not in named)
    return list(dict.fromkeys(named)), list(dict.fromkeys(of_runs))


def chains_of_runs(runs_dir: str | Path) -> Iterator[str]:
    """The chains of all runs, the run that was started last first. Folders that are no runs are passed over."""
    runs = sorted(runs_dir_of(runs_dir).glob("*/run.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(runs):
        try:
            yield chain_of_run(path.parent)
        except WeightlineError:
            continue


def _announced(client: SyncPrefectClient, chain: str, manifests: Sequence[Manifest]) -> set[str]:
    """Commit ids of those whose event the server has."""
    by_event = {str(event_id(chain, manifest.commit_id)): manifest.commit_id for manifest in manifests}
    found: set[str] = set()
    ids = list(by_event)
    for first in range(0, len(ids), _MAX_EVENTS):
        some = ids[first : first + _MAX_EVENTS]
        asked = {"filter": {"id": {"id": some}}, "limit": _MAX_EVENTS}
        response = client.request("POST", "/events/filter", json=asked)
        found |= {by_event[event["id"]] for event in response.json()["events"]}
    return found


def _under_way(client: SyncPrefectClient, chain: str) -> set[tuple[str, int]]:
    """Consumers' runs of this chain that have not ended. One that began long ago has ended without a word."""
    found = set()
    since = datetime.now(UTC) - timedelta(seconds=_MAX_SECONDS)
    for deployment in (EVALUATE, REFRESH):
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment.rpartition("/")[2]])),
            flow_run_filter=FlowRunFilter(
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNDER_WAY)),
                expected_start_time=FlowRunFilterExpectedStartTime(after_=since),
            ),
            limit=_MAX_READ,
        )
        found |= {(deployment, run.parameters["version"]) for run in runs if run.parameters.get("chain") == chain}
    return found
