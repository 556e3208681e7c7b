"""Evaluates one version with lm-evaluation-harness. Every commit starts this flow. Safe to repeat."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger

from weightline.chain.read.records import EVALUATIONS, Record
from weightline.flows.forms import ChainUrl, VersionNumber, label
from weightline.runs.checks import check_version
from weightline.tasks.evaluation import evaluate, skip_for_newer
from weightline.tasks.lineage import draw_lineage
from weightline.tasks.waiting_runs import finish_waiting_runs


@flow(name="evaluate-version", flow_run_name="evaluate v{version}", persist_result=False)
def evaluate_version(
    chain: ChainUrl,
    version: VersionNumber,
    task: Annotated[str | None, label("Task", min_length=1)] = None,
    limit: Annotated[int | None, label("Problems", ge=1)] = None,
    or_newer: Annotated[bool, label("Evaluate the newest version instead, if there is a newer one")] = False,
) -> Record:
    """Evaluate a version. A version that has a score keeps it.

    Args:
        chain: URL of the bucket and chain.
        version: The version to evaluate.
        task: Task of lm-evaluation-harness. Empty: that of the recipe of the version's run.
        limit: Number of problems, from the start of the task. Empty: that of the recipe.
        or_newer: If the same training has committed a newer version meanwhile, evaluate the newest one, and record that
            this one and those between them were skipped. A milestone is always evaluated. Commits start the flow so.
    """
    check_version(chain, version)
    skipped = skip_for_newer(chain, version, task, limit) if or_newer else None
    if skipped is not None:
        finish_waiting_runs(EVALUATIONS, chain, skipped[1])
    evaluated = version if skipped is None else skipped[1].newer_version
    measured = evaluate(chain, evaluated, task, limit)
    get_run_logger().info("version %d: %s, score %s", evaluated, measured["status"], measured.get("score"))
    draw_lineage(chain, evaluated)
    return measured if skipped is None else skipped[0]
