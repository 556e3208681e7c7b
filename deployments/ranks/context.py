"""Passes the flow run of a stage to its rank processes, in a JSON file that their environment names.

The stage's flow run writes the file (`write_rank_context`), and each of its ranks enters it (`rank_context`). The file
is JSON and not a pickled context, so that people can read it and reading it executes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
DEFAULT_MAX_RECORDED_RANKS = 8
#: Names the step observer that a rank makes under a flow run.
OBSERVER = "weightline.tasks.sync_steps:prefect_observer"

#: Prefect's settings in a rank. It prints nothing (the trainer raises the error of a step), sends no logs, starts no
#: server of its own, and does not request the server's version, since the server may be gone.
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
    """Writes the current flow run to the file. Called inside the stage's flow run. Safe to repeat."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("write_rank_context was called outside a flow run")
    facts = {
        "flow_run": context.flow_run.model_dump(mode="json"),
        "flow_name": context.flow.name if context.flow else "stage",
    }
    path.write_text(json.dumps(facts))


def rank_environment(context_path: Path, api_url: str | None, base: Mapping[str, str]) -> dict[str, str]:
    """Returns `base` with the variables by which ranks record their steps under the flow run in `context_path`. Pure.

    Without a server's URL the ranks record nothing.
    """
    if api_url is None:
        return dict(base)
    return {**base, **_QUIET, "PREFECT_API_URL": api_url, RANK_CONTEXT_VARIABLE: str(context_path)}


def max_recorded_ranks() -> int:
    """Returns the largest number of ranks that are all recorded. Of a larger job only rank 0 is recorded."""
    return int(os.environ.get(MAX_RECORDED_RANKS_VARIABLE, DEFAULT_MAX_RECORDED_RANKS))


def is_under_a_flow_run() -> bool:
    """Returns whether this process's environment names a flow run and a server."""
    return RANK_CONTEXT_VARIABLE in os.environ and PREFECT_API_URL.value() is not None


@contextmanager
def rank_context() -> Iterator[None]:
    """Enters the stage's flow run: in the block, Prefect tasks are its task runs, and events go to the outbox.

    May be called by one thread, once per process. Raises OSError or ValueError for a file that `write_rank_context`
    did not write.
    """
    facts: dict[str, Any] = json.loads(Path(os.environ[RANK_CONTEXT_VARIABLE]).read_text())
    flow_run = FlowRun.model_validate(facts["flow_run"])
    remember_flow(flow_run.flow_id, facts["flow_name"])
    send_events_to(EventOutbox(str(PREFECT_API_URL.value())))
    with flow_run_context(_stage, flow_run):
        yield


@flow
def _stage() -> None:
    """Stands for the stage's flow, so that the ranks need not import its code."""
