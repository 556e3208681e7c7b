"""Starts flow runs on a Prefect server, reads their states, and names the flow run of this process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException

from weightline.runs.folder import Run, new_run_id
from weightline.stages.load import load_recipe

POST_TRAINING = "post-training/post-training"
RECONCILE = "reconcile/reconcile"


@dataclass(frozen=True, slots=True)
class RunState:
    """The state of a flow run as the server has it."""

    kind: str
    """Prefect's state type: RUNNING, COMPLETED, FAILED, CRASHED, CANCELLED, ..."""
    message: str
    is_final: bool

    @property
    def is_completed(self) -> bool:
        return self.kind == "COMPLETED"


def start_training(run: Run) -> UUID:
    """Starts the post-training deployment for a prepared run. Not safe to repeat: it starts another flow run."""
    parameters = {"recipe": None, "run_id": run.run_id, "runs_dir": str(run.folder.parent), "chain": None}
    return _start(POST_TRAINING, parameters)


def start_reconcile(run: Run) -> UUID:
    """Starts the reconcile deployment for the run's chain, for young versions as well."""
    return _start(RECONCILE, {"chains": [run.chain_url], "grace_seconds": 0.0})


def read_run_state(flow_run_id: UUID) -> RunState | None:
    """Reads the flow run's state. Returns None while the server does not answer."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run_id).state
    except (httpx.HTTPError, PrefectException):
        return None
    return None if state is None else RunState(state.type.value, state.message or "", state.is_final())


def run_id_of_flow_run(recipe: str | None) -> str | None:
    """Returns a run id derived from the current flow run, so that a retry of the flow run resumes the same run.

    Returns None outside a flow run, or without a recipe to name the run after.
    """
    context = FlowRunContext.get()
    if recipe is None or context is None or context.flow_run is None:
        return None
    return f"{new_run_id(load_recipe(recipe).name, context.flow_run.created)}-{context.flow_run.id.hex[:4]}"


def flow_run_provenance() -> dict[str, str]:
    """Returns the id of the current flow run for the provenance in manifests. Empty outside a flow run."""
    context = FlowRunContext.get()
    return {"flow_run_id": str(context.flow_run.id)} if context is not None and context.flow_run is not None else {}


def _start(deployment: str, parameters: Mapping[str, object]) -> UUID:
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name(deployment)
        return client.create_flow_run_from_deployment(found.id, parameters=dict(parameters)).id
