"""Emits the event that announces a committed version. Events may be lost; `reconcile` finds such versions."""

from __future__ import annotations

import logging
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.events import emit_event

from weightline.chain import open_chain
from weightline.format.manifest import Header

COMMITTED = "weightline.delta.committed"
#: The fields of the manifest that the event's payload contains, beside the chain's URL under `chain`.
PAYLOAD_FIELDS = frozenset(
    {
        "version", "commit_id", "kind", "stage", "run_id", "global_step", "is_milestone",
        "num_changed", "num_elements", "payload_nbytes", "full_nbytes",
    }
)  # fmt: skip

logger = logging.getLogger(__name__)


def event_id(chain_url: str, commit_id: str) -> UUID:
    """Returns the same id for every announcement of one commit, so that the server keeps the first."""
    return uuid5(NAMESPACE_URL, f"{chain_url}#{commit_id}")


def announce_commit(chain_url: str, manifest: Header) -> None:
    """Emits `weightline.delta.committed`. Safe to repeat. Returns at once; never raises: a failure is logged."""
    try:
        name = open_chain(chain_url).name
        emit_event(
            COMMITTED,
            resource={
                "prefect.resource.id": f"weightline.chain.{name}.{manifest.version}",
                "prefect.resource.name": f"{name} v{manifest.version}",
            },
            payload={"chain": chain_url, **manifest.model_dump(include=set(PAYLOAD_FIELDS))},
            id=event_id(chain_url, manifest.commit_id),
        )
    # The version is committed even if its event is lost, so no error of Prefect may reach the caller.
    except Exception as error:  # noqa: BLE001
        logger.warning("version %d was not announced: %r", manifest.version, error)
