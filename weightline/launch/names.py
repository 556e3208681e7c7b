"""Names that Prefect accepts, and names that processes share. Pure."""

from __future__ import annotations

import re

#: The folder of all runs, told by a stack to its processes.
RUNS_DIR_VARIABLE = "WEIGHTLINE_RUNS_DIR"


def chain_name(url: str) -> str:
    """ "s3://bucket/chains/my-model/" -> "my-model": what a chain is called where its URL is too long."""
    return url.rstrip("/").rpartition("/")[2] or url


def artifact_key(text: str) -> str:
    """Lowercase letters, digits and dashes: "lineage-My_Chain" -> "lineage-my-chain"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def lineage_key(chain_name: str) -> str:
    """The artifact that shows a chain's lineage."""
    return artifact_key(f"lineage-{chain_name}")
