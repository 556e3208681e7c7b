"""Runs of consumers on a Prefect server: active ones, attempts at a record, announced versions, and skipped runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Completed

from weightline.chain.read.overtaken import Overtaken
from weightline.chain.read.records import EVALUATIONS, REFRESHES
from weightline.deployments.server.events import event_id
from weightline.format.manifest import Header
from weightline.lineage.owed import MAX_ATTEMPTS, Attempt, ConsumerRun, MissingRecord
from weightline.runs.folder import canonical_url

#: The deployment that makes each kind of record, as FLOW/DEPLOYMENT.
CONSUMERS = {EVALUATIONS: "evaluate-version/evaluate-version", REFRESHES: "refresh-serving/refresh-serving"}
#: A consumer's run that takes longer counts as ended.
MAX_SECONDS = 3600.0
_UNDER_WAY = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
_MAX_READ = 200
_MAX_EVENTS = 50


def idempotency_keys(missing: MissingRecord) -> tuple[str, ...]:
    """Returns the keys of all runs for a record, in order. The server starts at most one run for each key."""
    start = f"{CONSUMERS[missing.kind]}:{event_id(missing.chain, missing.commit_id)}"
    return tuple(f"{start}:{number}" for number in range(MAX_ATTEMPTS))


def ended_at(run: FlowRun, now: datetime) -> datetime | None:
    """Returns when the run ended, or None while it is active. A run longer than `MAX_SECONDS` counts as ended. Pure."""
    state = run.state
    if state is None or state.is_scheduled() or state.is_paused():
        return None
    is_over = state.is_final() or now - state.timestamp > timedelta(seconds=MAX_SECONDS)
    return state.timestamp if is_over else None


def attempts_of(
    missing: Sequence[MissingRecord], runs: Mapping[str, FlowRun], now: datetime
) -> dict[MissingRecord, tuple[Attempt, ...]]:
    """Returns the attempts at each record, oldest first. `runs`: by idempotency key. Pure."""

    def attempt(run: FlowRun) -> Attempt:
        return Attempt(ended_at(run, now), (run.state and run.state.message) or "it left no message")

    return {record: tuple(attempt(runs[key]) for key in idempotency_keys(record) if key in runs) for record in missing}


def read_attempts(
    client: SyncPrefectClient, missing: Sequence[MissingRecord], now: datetime
) -> dict[MissingRecord, tuple[Attempt, ...]]:
    """Reads the runs that were started for these records."""
    found: dict[str, FlowRun] = {}
    size = _MAX_READ // MAX_ATTEMPTS
    for first in range(0, len(missing), size):
        keys = [key for record in missing[first : first + size] for key in idempotency_keys(record)]
        wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
        runs = client.read_flow_runs(flow_run_filter=wanted, limit=_MAX_READ)
        found |= {run.idempotency_key: run for run in runs if run.idempotency_key is not None}
    return attempts_of(missing, found, now)


def read_under_way(client: SyncPrefectClient, now: datetime) -> frozenset[ConsumerRun]:
    """Reads the consumers' runs that have not ended."""
    found: set[ConsumerRun] = set()
    for kind, deployment in CONSUMERS.items():
        runs = client.read_flow_runs(
            deployment_filter=_named(deployment), flow_run_filter=_in_states(_UNDER_WAY), limit=_MAX_READ
        )
        going_on = (run.parameters for run in runs if ended_at(run, now) is None)
        found |= {ConsumerRun(kind, canonical_url(str(p.get("chain"))), p["version"]) for p in going_on}
    return frozenset(found)


def skip_waiting_runs(client: SyncPrefectClient, kind: str, chain: str, overtaken: Overtaken) -> int:
    """Completes the runs of the consumer that wait for one of these versions, or for the newer one. Returns how many.

    Only runs with `or_newer` are ended, as those that commits started: a person asked for any other one.
    """
    versions = {*overtaken.versions, overtaken.newer_version}
    runs = client.read_flow_runs(
        deployment_filter=_named(CONSUMERS[kind]),
        flow_run_filter=_in_states([StateType.SCHEDULED]),
        sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        limit=_MAX_READ,
    )
    state: State[None] = Completed(name="Skipped", message=f"version {overtaken.newer_version} is newer")
    waiting = [run for run in runs if _waits_for(run.parameters, canonical_url(chain), versions)]
    for run in waiting:
        client.set_flow_run_state(run.id, state)
    return len(waiting)


def _waits_for(parameters: Mapping[str, object], chain: str, versions: Collection[int]) -> bool:
    is_listed = parameters.get("version") in versions and parameters.get("or_newer") is True
    return is_listed and canonical_url(str(parameters.get("chain"))) == chain


def _named(deployment: str) -> DeploymentFilter:
    return DeploymentFilter(name=DeploymentFilterName(any_=[deployment.rpartition("/")[2]]))


def _in_states(kinds: list[StateType]) -> FlowRunFilter:
    return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=kinds)))


def read_announced(client: SyncPrefectClient, chain: str, manifests: Iterable[Header]) -> frozenset[str]:
    """Returns the commit ids of those of these versions whose event the server has."""
    by_event = {str(event_id(chain, manifest.commit_id)): manifest.commit_id for manifest in manifests}
    found: set[str] = set()
    ids = list(by_event)
    for first in range(0, len(ids), _MAX_EVENTS):
        query = {"filter": {"id": {"id": ids[first : first + _MAX_EVENTS]}}, "limit": _MAX_EVENTS}
        response = client.request("POST", "/events/filter", json=query)
        found |= {by_event[event["id"]] for event in response.json()["events"]}
    return frozenset(found)
