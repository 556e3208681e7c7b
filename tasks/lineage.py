"""The lineage of a chain as an artifact in the Prefect UI: the same graph and table as everywhere else."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from tasks.names import lineage_key
from weightline.chain import open_chain
from weightline.lineage.graph import MAX_NODES
from weightline.lineage.read import read_lineage
from weightline.lineage.table import lineage_markdown


@task(task_run_name="draw lineage", cache_policy=NO_CACHE, persist_result=False)
def draw_lineage(chain: str) -> str:
    """Rewrite the artifact `lineage-<chain>` from the bucket: the newest versions only. Safe to repeat."""
    opened = open_chain(chain)
    key = lineage_key(opened.name)
    create_markdown_artifact(
        lineage_markdown(opened.url, read_lineage(opened, MAX_NODES)), key=key, description=f"Lineage of {opened.name}"
    )
    return key
