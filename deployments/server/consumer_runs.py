"""What the server knows of the runs that versions are owed: which events it has, which runs go on, which were tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType

from weightline.deployments.server.events import event_id
from weightline.errors import WeightlineError
from weightline.format.manifest import Manifest
from weightline.store import open_store

EVALUATE = "evaluate-version/evaluate-version"
REFRESH = "refresh-serving/refresh-serving"
#: After a run that ended without a record the next is started so much later, then twice, four times, ... so much.
WINDOW_SECONDS = 300
#: So many runs, the last one two and a half hours after the first: then it is written down that none succeeded.
MAX_RUNS = 6
#: A consumer's run that has gone on for longer is taken for dead.
MAX_SECONDS = 3600.0
_UNDER_WAY = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING]
_MAX_READ = 200
_MAX_EVENTS = 50

#: A deployment, a chain's URL, a version.
UnderWay = tuple[str, str, int]


@dataclass(frozen=True, slots=True)
class Missing:
    """A record that a consumer owes a version."""

    chain: str
    version: int
    commit_id: str
    deployment: str
    num_tried: int = 0
    """Runs that were started for it and have ended."""

    @property
    def idempotency_key(self) -> str:
        """Of the next run for it: the server starts one, however many reconcile at once."""
        return self.idempotency_keys[self.num_tried]

    @property
    def idempotency_keys(self) -> tuple[str, ...]:
        """Of all runs for it, in order."""
        start = f"{self.deployment}:{event_id(self.chain, self.commit_id)}"
        return tuple(f"{start}:{number}" for number in range(MAX_RUNS))


def next_step(ends: Sequence[datetime | None], now: datetime) -> Literal["start", "wait", "give up"]:
    """What to do about a record that is owed, from when the runs for it ended: None for one that goes on. Pure."""
    if not ends:
        return "start"
    last = ends[-1]
    if last is None or now < last + timedelta(seconds=WINDOW_SECONDS * 2 ** (len(ends) - 1)):
        return "wait"
    return "start" if len(ends) < MAX_RUNS else "give up"


def ended_at(run: FlowRun, now: datetime) -> datetime | None:
    """When it ended; None while it waits or goes on. One that began long ago has ended without a word. Pure."""
    state = run.state
    if state is None or state.is_scheduled() or state.is_paused():
        return None
    is_over = state.is_final() or now - state.timestamp > timedelta(seconds=MAX_SECONDS)
    return state.timestamp if is_over else None


def read_runs_of(client: SyncPrefectClient, missing: Sequence[Missing]) -> Mapping[str, FlowRun]:
    """The runs that were started for what is owed, by key."""
    found: dict[str, FlowRun] = {}
    size = _MAX_READ // MAX_RUNS
    for first in range(0, len(missing), size):
        keys = [key for one in missing[first : first + size] for key in one.idempotency_keys]
        wanted = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=keys))
        runs = client.read_flow_runs(flow_run_filter=wanted, limit=_MAX_READ)
        found |= {run.idempotency_key: run for run in runs if run.idempotency_key is not None}
    return found


def read_under_way(client: SyncPrefectClient, now: datetime) -> frozenset[UnderWay]:
    """Consumers' runs that have not ended."""
    found: set[UnderWay] = set()
    for deployment in (EVALUATE, REFRESH):
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[deployment.rpartition("/")[2]])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_UNDER_WAY))),
            limit=_MAX_READ,
        )
        going_on = (run for run in runs if ended_at(run, now) is None)
        found |= {(deployment, url_of(str(r.parameters.get("chain"))), r.parameters["version"]) for r in going_on}
    return frozenset(found)


def read_announced(client: SyncPrefectClient, chain: str, manifests: Iterable[Manifest]) -> frozenset[str]:
    """Commit ids of those whose event the server has."""
    by_event = {str(event_id(chain, manifest.commit_id)): manifest.commit_id for manifest in manifests}
    found: set[str] = set()
    ids = list(by_event)
    for first in range(0, len(ids), _MAX_EVENTS):
        asked = {"filter": {"id": {"id": ids[first : first + _MAX_EVENTS]}}, "limit": _MAX_EVENTS}
        response = client.request("POST", "/events/filter", json=asked)
        found |= {by_event[event["id"]] for event in response.json()["events"]}
    return frozenset(found)


def url_of(chain: str) -> str:
    """One spelling for each chain; what names none stays as it is."""
    try:
        return open_store(chain).url
    except (WeightlineError, ValueError):
        return chain
