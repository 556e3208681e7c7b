"""What happened to versions after their commit, written beside the chain so that the bucket alone tells the lineage.

A record is a JSON object with at least `status`: `done`, `skipped`, `failed` or `rolled_back`. Records are create-only:
the first one stands, which makes every consumer keyed by (chain, version) safe to repeat.
"""

from __future__ import annotations

import json
from typing import Any

from weightline.chain.commit import utc_now
from weightline.chain.history import Chain
from weightline.errors import NotFoundError, ObjectExistsError
from weightline.format import keys

EVALUATIONS = "evaluations"
REFRESHES = "refreshes"
ROLLOUTS = "rollouts"
GAPS = "gaps"

Record = dict[str, Any]


def write_record(chain: Chain, kind: str, version: int, name: str, record: Record) -> Record:
    """Write the record with the time added, and return the one that stands: ours, or the earlier one."""
    stamped = {"kind": kind, "version": version, "name": name, "recorded_at": utc_now(), **record}
    key = keys.record(kind, version, name)
    try:
        chain.store.put_if_absent(key, json.dumps(stamped, indent=1, sort_keys=True).encode())
    except ObjectExistsError:
        return _parse(chain.store.get(key))
    return stamped


def read_record(chain: Chain, kind: str, version: int, name: str) -> Record | None:
    """The record, or None."""
    try:
        return _parse(chain.store.get(keys.record(kind, version, name)))
    except NotFoundError:
        return None


def read_records(chain: Chain, kind: str, first: int = 0) -> list[Record]:
    """Every record of a kind from version `first` on, by version and name."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    return [_parse(chain.store.get(info.key)) for info in chain.store.list(prefix, f"{prefix}{keys.padded(first)}")]


def _parse(raw: bytes) -> Record:
    record: Record = json.loads(raw)
    return record
