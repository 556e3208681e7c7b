"""Wraps every undocumented name of Prefect that this project uses. No other module may use such a name.

A new release of Prefect may drop or change any of these names. `tests/deployments/test_prefect_private.py` lists them
and fails with the name that the installed Prefect lacks.
"""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from typing import Any, Protocol, cast
from uuid import UUID

from prefect.client.schemas.objects import Flow as FlowFacts
from prefect.client.schemas.objects import FlowRun
from prefect.context import SyncClientContext, hydrated_context, refresh_global_settings_context
from prefect.events.related import RESOURCE_CACHE
from prefect.events.worker import EventsWorker, ProcessPoolForwardingEventsClient
from prefect.filesystems import LocalFileSystem
from prefect.flows import Flow
from prefect.results import ResultStore


class EventQueue(Protocol):
    """Takes the events of this process. `put` receives pairs of a kind and a `prefect.events.Event`."""

    def put(self, item: tuple[str, Any]) -> None: ...


def send_events_to(queue: EventQueue) -> None:
    """Hands every event that this process emits to `queue`, instead of sending it to the server."""
    EventsWorker.set_client_override(ProcessPoolForwardingEventsClient, event_queue=queue)


def drain_events() -> None:
    """Waits until every event that this process emitted was sent."""
    EventsWorker.drain_all()


def remember_flow(flow_id: UUID, name: str) -> None:
    """Caches the name of a flow in this process, so that no event has to wait for a request to the server."""
    facts = FlowFacts(id=flow_id, name=name, labels={})
    RESOURCE_CACHE[f"flow.{flow_id}"] = cast(Any, ({"kind": "flow", "object": facts}, datetime.now(UTC)))


def flow_run_context(flow: Flow[Any, Any], flow_run: FlowRun) -> AbstractContextManager[object]:
    """Returns a context in which tasks belong to this flow run, as Prefect enters it in the processes of a task runner.

    Results are not persisted. The result store is named only because Prefect would ask the server for a default.
    """
    context = {
        "flow": flow,
        "flow_run": flow_run,
        "parameters": {},
        "result_store": ResultStore(result_storage=LocalFileSystem(basepath=tempfile.gettempdir())),
        "persist_result": False,
    }
    stack = ExitStack()
    stack.enter_context(hydrated_context({"flow_run_context": context}))
    stack.enter_context(SyncClientContext())
    return stack


def reload_settings() -> None:
    """Reads Prefect's settings again from the environment, which has changed since Prefect was imported."""
    refresh_global_settings_context()
