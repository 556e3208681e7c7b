"""Names that Prefect accepts. Pure."""

from __future__ import annotations

import re


def artifact_key(text: str) -> str:
    """Lowercase letters, digits and dashes: "lineage-My_Chain" -> "lineage-my-chain"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def lineage_key(chain_name: str) -> str:
    """The artifact that shows a chain's lineage."""
    return artifact_key(f"lineage-{chain_name}")
