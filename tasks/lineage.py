"""Writes a chain's graph and table as an artifact of the Prefect UI, as a Prefect task."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import open_chain
from weightline.deployments.server.artifacts import lineage_key
from weightline.lineage.graph import MAX_NODES
from weightline.lineage.openlineage import try_export
from weightline.lineage.pages import lineage_markdown
from weightline.lineage.read import read_lineage, read_shortcuts


@task(task_run_name="draw lineage", cache_policy=NO_CACHE, persist_result=False)
def draw_lineage(chain: str, version: int | None = None) -> str:
    """Rewrites the artifact `lineage-<chain>` with the newest versions, from the bucket. Safe to repeat.

    Exports the events of `version` to OpenLineage as well, if the environment names a server for them.
    """
    opened = open_chain(chain)
    key = lineage_key(opened.name)
    page = lineage_markdown(opened.url, read_lineage(opened, MAX_NODES), shortcuts=read_shortcuts(opened))
    create_markdown_artifact(page, key=key, description=f"Lineage of {opened.name}")
    if version is not None:
        try_export(opened, version, get_run_logger())
    return key
