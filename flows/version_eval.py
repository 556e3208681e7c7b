"""Measure one version with lm-evaluation-harness. Started by every commit; safe to start again."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from tasks.evaluation import evaluate
from tasks.lineage import draw_lineage


@flow(name="evaluate-version", flow_run_name="evaluate v{version}", persist_result=False)
def evaluate_version(
    chain: str,
    version: Annotated[int, Field(ge=0)],
    task: str | None = None,
    limit: Annotated[int, Field(ge=1)] | None = None,
) -> dict[str, Any]:
    """Measure a version, or record that a newer one took its place. A milestone is always measured.

    Args:
        chain: URL of the bucket and chain.
        version: Which version.
        task: Task of lm-evaluation-harness. Empty: what the recipe of the version's run says.
        limit: Use the first so many problems. Empty: what the recipe says.
    """
    record = evaluate(chain, version, task, limit)
    get_run_logger().info("version %d: %s, score %s", version, record["status"], record.get("score"))
    draw_lineage(chain)
    return record
