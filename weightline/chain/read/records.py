"""What happened to versions after their commit, written beside the chain so that the bucket alone tells the lineage.

A record is a JSON object with at least `status`: `done`, `skipped`, `failed` or `rolled_back`. Records are create-only:
the first one stands, which makes every consumer keyed by (chain, version) safe to repeat.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import ConfigDict

from weightline.chain.read.history import Chain
from weightline.chain.read.stored import Stored, read_stored, require_key
from weightline.chain.write.commit import utc_now
from weightline.errors import NotFoundError, ObjectExistsError
from weightline.format import keys
from weightline.format.manifest import Count

EVALUATIONS = "evaluations"
REFRESHES = "refreshes"
ROLLOUTS = "rollouts"
GAPS = "gaps"

Record = dict[str, Any]


class _Record(Stored):
    """What every record says; the rest is its writer's, who may have said something else by `kind`."""

    model_config = ConfigDict(extra="allow")

    version: Count
    name: str
    status: str


def write_record(chain: Chain, kind: str, version: int, name: str, record: Record) -> Record:
    """Write the record with the time added, and return the one that stands: ours, or the earlier one."""
    stamped = {"kind": kind, "version": version, "name": name, "recorded_at": utc_now(), **record}
    key = keys.record(kind, version, name)
    try:
        chain.store.put_if_absent(key, json.dumps(stamped, indent=1, sort_keys=True).encode())
    except ObjectExistsError:
        return _parse(chain, key)
    return stamped


def read_record(chain: Chain, kind: str, version: int, name: str) -> Record | None:
    """The record, or None."""
    try:
        return _parse(chain, keys.record(kind, version, name))
    except NotFoundError:
        return None


def read_records(chain: Chain, kind: str, first: int = 0) -> list[Record]:
    """Every record of a kind from version `first` on, by version and name."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    return [_parse(chain, info.key) for info in chain.store.list(prefix, f"{prefix}{keys.padded(first)}")]


def recorded_versions(chain: Chain, kind: str) -> frozenset[int]:
    """The versions that have a record of this kind, by the keys: one listing, and no record is read."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    found = (info.key.removeprefix(prefix).partition("/")[0] for info in chain.store.list(prefix))
    return frozenset(int(digits) for digits in found if digits.isdigit())


def _parse(chain: Chain, key: str) -> Record:
    """CorruptError for what is no record, or another one than its key says."""
    record = read_stored(chain, key, _Record)
    kind = key.removeprefix(keys.RECORDS).partition("/")[0]
    require_key(chain, key, f"{keys.RECORDS}{kind}/{keys.padded(record.version)}/{record.name}.json")
    return record.model_dump()
