"""Ends flow runs that wait for versions on which nothing is left to do, as a Prefect task."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client

from weightline.chain.read.overtaken import Overtaken
from weightline.deployments.server.consumer_runs import skip_waiting_runs


@task(task_run_name="skip waiting runs", cache_policy=NO_CACHE, persist_result=False)
def finish_waiting_runs(kind: str, chain: str, overtaken: Overtaken) -> int:
    """Completes the consumer's waiting runs of overtaken versions, as `Skipped`. Returns how many. Safe to repeat.

    The newer version's own run is among them, since the run that calls this does its work. If that run then dies, the
    flow `reconcile` finds that the record is missing. `kind` is EVALUATIONS or REFRESHES.
    """
    with get_client(sync_client=True) as client:
        num_skipped = skip_waiting_runs(client, kind, chain, overtaken)
    if num_skipped:
        get_run_logger().info("%d waiting runs were skipped for version %d", num_skipped, overtaken.newer_version)
    return num_skipped
