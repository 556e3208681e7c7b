"""Determines the replicas of a chain from their leases, or without any leases from the records of refreshes. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from weightline.chain.read.leases import HeldLease
from weightline.dashboard.records import Document

_MAX_TEXT = 200


def lease_document(held: HeldLease, now: datetime) -> Document:
    """Returns the fields of a lease that are shown. Fields that change with every renewal are left out."""
    lease = held.lease
    texts = {"engine": lease.engine, "state": lease.state, "host": lease.host, "follows": lease.follows}
    return {
        "name": lease.replica[:_MAX_TEXT],
        "version": lease.version,
        "moving_to": lease.moving_to,
        "since": lease.served_at,
        "has_lease": True,
        "is_expired": not held.is_live(now),
        **{name: text[:_MAX_TEXT] for name, text in texts.items() if text is not None},
    }


def known_replicas(leases: Iterable[Document], refreshes: Mapping[int, Sequence[Document]]) -> tuple[Document, ...]:
    """Returns every replica, ordered by name: its lease, completed by its newest record.

    If any replica has a lease, replicas with records only are marked as expired.
    """
    held = {lease["name"]: lease for lease in leases}
    found: dict[str, Document] = {}
    for version in sorted(refreshes):
        for record in refreshes[version]:
            if record["status"] == "done":
                found[record["name"]] = {
                    "name": record["name"], "version": version, "since": record.get("served_at"), "has_lease": False,
                    "is_expired": bool(held),
                }  # fmt: skip
    for name, lease in held.items():
        record = found.get(name, {})
        since = lease["since"] or (record.get("since") if record.get("version") == lease["version"] else None)
        found[name] = {**lease, "since": since}
    return tuple(found[name] for name in sorted(found))
