"""The lineage of a chain as an artifact in the Prefect UI: the same graph and table as everywhere else."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from weightline.chain import Chain, open_chain
from weightline.deployments.server.artifacts import lineage_key
from weightline.lineage.graph import MAX_NODES
from weightline.lineage.openlineage import export_version
from weightline.lineage.read import read_lineage, read_shortcuts
from weightline.lineage.table import lineage_markdown


@task(task_run_name="draw lineage", cache_policy=NO_CACHE, persist_result=False)
def draw_lineage(chain: str, version: int | None = None) -> str:
    """Rewrite the artifact `lineage-<chain>` from the bucket: the newest versions only. Safe to repeat.

    What became of `version` goes to the company's own lineage tool as well, where the environment names one.
    """
    opened = open_chain(chain)
    key = lineage_key(opened.name)
    page = lineage_markdown(opened.url, read_lineage(opened, MAX_NODES), shortcuts=read_shortcuts(opened))
    create_markdown_artifact(page, key=key, description=f"Lineage of {opened.name}")
    if version is not None:
        _export(opened, version)
    return key


def _export(chain: Chain, version: int) -> None:
    try:
        export_version(chain, version)
    # Whatever somebody else's service does, the version was measured and served.
    except Exception as error:  # noqa: BLE001
        get_run_logger().warning("no OpenLineage events of version %d: %r", version, error)
