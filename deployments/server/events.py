"""The event that announces a committed version. It is a hint: `reconcile` finds lost events from the bucket."""

from __future__ import annotations

import logging
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.events import emit_event

from weightline.chain import open_chain

COMMITTED = "weightline.delta.committed"

logger = logging.getLogger(__name__)


def event_id(chain_url: str, commit_id: str) -> UUID:
    """Returns the same id for every announcement of one commit, so that the server keeps the first."""
    return uuid5(NAMESPACE_URL, f"{chain_url}#{commit_id}")


def announce_commit(chain_url: str, facts: dict[str, Any]) -> None:
    """Emits `weightline.delta.committed`. Safe to repeat. Returns at once; never raises: a failure is logged."""
    try:
        name = open_chain(chain_url).name
        emit_event(
            COMMITTED,
            resource={
                "prefect.resource.id": f"weightline.chain.{name}.{facts['version']}",
                "prefect.resource.name": f"{name} v{facts['version']}",
            },
            payload={"chain": chain_url, **facts},
            id=event_id(chain_url, facts["commit_id"]),
        )
    # The version is committed whatever becomes of its event.
    except Exception as error:  # noqa: BLE001
        logger.warning("version %s was not announced: %r", facts.get("version"), error)
