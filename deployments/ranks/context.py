"""How a rank process finds the flow run that it works for: a JSON file, named in its environment.

The stage's flow run writes it (`write_rank_context`), every rank of it enters it (`enter_rank_context`). JSON and not
a pickled context: readable, and safe to read.
"""

from __future__ import annotations

import atexit
import contextvars
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.settings import PREFECT_API_URL

from weightline.deployments.prefect_private import flow_run_context, remember_flow, send_events_to
from weightline.deployments.ranks.outbox import EventOutbox

RANK_CONTEXT_VARIABLE = "WEIGHTLINE_RANK_CONTEXT"
MAX_RECORDED_RANKS_VARIABLE = "WEIGHTLINE_MAX_RECORDED_RANKS"
STEPS = "weightline.tasks.sync_steps:prefect_steps"

#: Prefect in a rank: no word on the console (the step's own error is raised anyway), no logs over the network, no
#: server of its own, no questions to a server that may be gone.
_QUIET = {
    "PREFECT_LOGGING_SETTINGS_PATH": str(Path(__file__).with_name("rank_logging.yaml")),
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
    "PREFECT_CLIENT_MAX_RETRIES": "0",
    "PREFECT_API_REQUEST_TIMEOUT": "2",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
}


def write_rank_context(path: Path) -> None:
    """Write the current flow run to the file. Called inside the stage's flow run. Safe to repeat."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("write_rank_context was called outside a flow run")
    facts = {
        "flow_run": context.flow_run.model_dump(mode="json"),
        "flow_name": context.flow.name if context.flow else "stage",
    }
    path.write_text(json.dumps(facts))


def rank_environment(context_path: Path, api_url: str | None, base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what ranks need to record their steps under the flow run in `context_path`. Pure.

    Without a server's URL the ranks just run their steps.
    """
    if api_url is None:
        return dict(base)
    return {**base, **_QUIET, "PREFECT_API_URL": api_url, RANK_CONTEXT_VARIABLE: str(context_path)}


def enter_rank_context() -> contextvars.Context | None:
    """A context in which Prefect tasks are task runs of the stage's flow run, and events go to the outbox.

    None where no flow run or no server is named: Prefect would start a server of its own.
    """
    path, api_url = os.environ.get(RANK_CONTEXT_VARIABLE), PREFECT_API_URL.value()
    if path is None or api_url is None:
        return None
    send_events_to(EventOutbox(api_url))
    context = contextvars.copy_context()
    context.run(_enter, json.loads(Path(path).read_text()))
    atexit.register(context.run, _ENTERED.close)
    return context


#: Holds what was entered until the process ends: without a reference, it would be left when garbage is collected.
_ENTERED = ExitStack()


@flow
def _stage() -> None:
    """Stands for the stage's flow, whose code the ranks need not import."""


def _enter(facts: dict[str, Any]) -> None:
    """Enter the flow run for good: the context lives as long as the process."""
    flow_run = FlowRun.model_validate(facts["flow_run"])
    remember_flow(flow_run.flow_id, facts["flow_name"])
    _ENTERED.enter_context(flow_run_context(_stage, flow_run))
