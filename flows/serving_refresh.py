"""Move the inference server to one version, in place. Started by every commit; safe to start again."""

from __future__ import annotations

from typing import Annotated, Any

from prefect import flow, get_run_logger
from pydantic import Field

from tasks.lineage import draw_lineage
from tasks.serving import refresh


@flow(name="refresh-serving", flow_run_name="refresh to v{version}", persist_result=False)
def refresh_serving(chain: str, version: Annotated[int, Field(ge=0)]) -> dict[str, Any]:
    """Move the chain's inference server to a version. A server that is further already stays there.

    Args:
        chain: URL of the bucket and chain.
        version: Which version.
    """
    record = refresh(chain, version)
    get_run_logger().info("version %d: %s, paused for %s s", version, record["status"], record.get("pause_seconds"))
    draw_lineage(chain)
    return record
