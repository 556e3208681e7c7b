"""Measure one version with lm-evaluation-harness. Started by every commit; safe to start again."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger

from weightline.flows.forms import ChainUrl, VersionNumber, label
from weightline.runs.checks import check_version
from weightline.tasks.evaluation import evaluate
from weightline.tasks.lineage import draw_lineage


@flow(name="evaluate-version", flow_run_name="evaluate v{version}", persist_result=False)
def evaluate_version(
    chain: ChainUrl,
    version: VersionNumber,
    task: Annotated[str | None, label("Task", min_length=1)] = None,
    limit: Annotated[int | None, label("Problems", ge=1)] = None,
) -> dict[str, Any]:
    """Measure a version, or record that a newer one took its place. A milestone is always measured.

    Args:
        chain: URL of the bucket and chain.
        version: Which version.
        task: Task of lm-evaluation-harness. Empty: what the recipe of the version's run says.
        limit: Use the first so many problems. Empty: what the recipe says.
    """
    check_version(chain, version)
    record = evaluate(chain, version, task, limit)
    get_run_logger().info("version %d: %s, score %s", version, record["status"], record.get("score"))
    draw_lineage(chain, version)
    return record
