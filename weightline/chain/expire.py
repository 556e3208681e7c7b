"""Dropping old history. Nothing is deleted here: expiry moves a horizon, and gc deletes what lies behind it.

The horizon is an append-only record (`history/`), like a ref. A version stays reachable by replay only if an anchor
stands at or before it, so the horizon is always a version that has one.
"""

from __future__ import annotations

import json

from weightline.chain.commit import utc_now
from weightline.chain.compact import AnchorPolicy
from weightline.chain.compaction import CompactionPlan, write_compaction
from weightline.chain.history import Chain
from weightline.chain.ways import Ways
from weightline.errors import ConflictError, InputError, ObjectExistsError
from weightline.format import keys

__all__ = ["AnchorPolicy", "expire_before", "oldest_kept"]


def oldest_kept(chain: Chain) -> int:
    """The horizon: the oldest version that history keeps. 0 when nothing was ever expired."""
    records = [json.loads(chain.store.get(info.key)) for info in chain.store.list(keys.HISTORY)]
    return max((int(record["oldest_kept"]) for record in records), default=0)


def expire_before(chain: Chain, version: int) -> int:
    """Keep `version` and later ones; older history may be collected. Returns the horizon. Safe to repeat.

    Writes an anchor at `version` first when it has none. A crash in between leaves an anchor more, and nothing less.
    """
    chain.manifest(version)
    horizon = oldest_kept(chain)
    if version <= horizon:
        return horizon
    if not has_anchor(chain, version):
        write_compaction(chain, CompactionPlan(version, (), {}, writes_anchor=True), coding="ordered")
    number = sum(1 for _ in chain.store.list(keys.HISTORY))
    record = {"oldest_kept": version, "created_at": utc_now()}
    try:
        chain.store.put_if_absent(f"{keys.HISTORY}{keys.padded(number)}.json", json.dumps(record).encode())
    except ObjectExistsError as error:
        raise ConflictError("another process expired history at the same moment: look, and repeat") from error
    return version


def has_anchor(chain: Chain, version: int) -> bool:
    """Whether the version can be read from nothing by one hop."""
    return any(hop.base_version is None for hop in Ways(chain)(version))


def check_not_expired(chain: Chain, version: int) -> None:
    """InputError for a version behind the horizon: its objects may be gone at any moment."""
    horizon = oldest_kept(chain)
    if version < horizon:
        raise InputError(f"version {version} of {chain.url} is expired: the oldest kept is {horizon}", version=version)
