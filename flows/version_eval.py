"""Evaluates one version with lm-evaluation-harness. Every commit starts this flow. Safe to repeat."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from weightline.chain.read.records import Record
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
) -> Record:
    """Evaluate a version, or record that a newer one is evaluated instead. A milestone is always evaluated.

    Args:
        chain: URL of the bucket and chain.
        version: The version to evaluate.
        task: Task of lm-evaluation-harness. Empty: that of the recipe of the version's run.
        limit: Number of problems, from the start of the task. Empty: that of the recipe.
    """
    check_version(chain, version)
    record = evaluate(chain, version, task, limit)
    get_run_logger().info("version %d: %s, score %s", version, record["status"], record.get("score"))
    draw_lineage(chain, version)
    return record
