"""Runs that wait on a real Prefect server for versions on which nothing is left to do."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Running

from weightline.chain.read.overtaken import Overtaken
from weightline.chain.read.records import EVALUATIONS, REFRESHES
from weightline.deployments.server.consumer_runs import skip_waiting_runs
from weightline.flows.version_eval import evaluate_version

CHAIN = "file:///waiting"


@pytest.fixture
def evaluations(client: SyncPrefectClient) -> UUID:
    """The deployment of the flow, which no worker serves."""
    flow_id = client.create_flow(evaluate_version)
    return client.create_deployment(flow_id, name="evaluate-version", parameter_openapi_schema={})


def _waiting(client: SyncPrefectClient, deployment: UUID, version: int, **other: Any) -> UUID:
    parameters = {"chain": CHAIN, "version": version, "or_newer": True} | other
    return client.create_flow_run_from_deployment(deployment, parameters=parameters).id


def _state(client: SyncPrefectClient, run: UUID) -> str | None:
    return client.read_flow_run(run).state_name


def test_waiting_runs_of_overtaken_versions_are_skipped(client: SyncPrefectClient, evaluations: UUID) -> None:
    overtaken = [_waiting(client, evaluations, version) for version in (4, 5, 7)]
    others = [
        _waiting(client, evaluations, 6),  # a milestone, which is not overtaken
        _waiting(client, evaluations, 8),
        _waiting(client, evaluations, 5, or_newer=False),
        _waiting(client, evaluations, 5, chain="file:///another"),
    ]
    running = _waiting(client, evaluations, 3)
    client.set_flow_run_state(running, Running(), force=True)
    assert skip_waiting_runs(client, REFRESHES, CHAIN, Overtaken(7, (3, 4, 5))) == 0
    assert skip_waiting_runs(client, EVALUATIONS, CHAIN, Overtaken(7, (3, 4, 5))) == 3
    assert [_state(client, run) for run in overtaken] == ["Skipped"] * 3
    assert client.read_flow_run(overtaken[0]).state.is_completed()  # type: ignore[union-attr]
    assert [_state(client, run) for run in (*others, running)] == ["Scheduled"] * 4 + ["Running"]
    assert skip_waiting_runs(client, EVALUATIONS, CHAIN, Overtaken(7, (3, 4, 5))) == 0
    for run in (*others, running):
        client.delete_flow_run(run)
