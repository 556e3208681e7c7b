"""What a driver asks a Prefect server for: start a run of a deployment, tell its state, say what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectException

from weightline.runs.folder import Run

POST_TRAINING = "post-training/post-training"
RECONCILE = "reconcile/reconcile"


@dataclass(frozen=True, slots=True)
class RunState:
    """What the server says of a flow run."""

    kind: str
    """Prefect's state type: RUNNING, COMPLETED, FAILED, CRASHED, CANCELLED, ..."""
    message: str
    is_final: bool

    @property
    def is_completed(self) -> bool:
        return self.kind == "COMPLETED"


def start_training(run: Run) -> UUID:
    """Start the post-training deployment for a prepared run. Not safe to repeat: it starts another flow run."""
    parameters = {"recipe": None, "run_id": run.run_id, "runs_dir": str(run.folder.parent), "chain": None}
    return _start(POST_TRAINING, parameters)


def start_reconcile(run: Run) -> UUID:
    """Start what the run's versions are owed, however young they are."""
    return _start(RECONCILE, {"chains": [run.chain_url], "grace_seconds": 0.0})


def read_run_state(flow_run_id: UUID) -> RunState | None:
    """The flow run's state, or None while the server cannot say."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
    except (httpx.HTTPError, PrefectException):
        return None
    return None if state is None else RunState(state.type.value, state.message or "", state.is_final())


def _start(deployment: str, parameters: dict[str, Any]) -> UUID:
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        return client.create_flow_run_from_deployment(found.id, parameters=parameters).id
