"""Find versions that were committed while nobody listened, and start what they are owed. Scheduled."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger
from pydantic import Field

from tasks.reconciling import find_missing, newest_chain, start_missing


@flow(name="reconcile", persist_result=False)
def reconcile(
    chain: str | None = None, runs_dir: str = "runs", grace_seconds: Annotated[float, Field(ge=0)] = 120.0
) -> int:
    """Start evaluation and refresh of versions that have no record of it.

    Args:
        chain: URL of the bucket and chain. Empty: the chain of the newest run.
        runs_dir: Folder of all runs.
        grace_seconds: Leave versions that are younger than this to their events.
    """
    chosen = chain or newest_chain(runs_dir)
    if chosen is None:
        get_run_logger().info("there is no run in %s yet", runs_dir)
        return 0
    missing = find_missing(chosen, grace_seconds)
    for one in missing:
        start_missing(chosen, one)
    return len(missing)
