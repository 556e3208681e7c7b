"""Dropping old history. Nothing is deleted here: expiry moves a horizon, and gc deletes what lies behind it.

A version stays reachable by replay only if an anchor stands at or before it, so the horizon always has one.
"""

from __future__ import annotations

from weightline.chain.read.history import Chain
from weightline.chain.read.horizon import move_horizon, oldest_kept
from weightline.chain.replay.ways import Ways
from weightline.chain.upkeep.compaction import CompactionPlan, write_compaction
from weightline.codec.anchor import ANCHOR_CODING


def expire_before(chain: Chain, version: int) -> int:
    """Keep `version` and later ones; older history may be collected. Returns the horizon. Safe to repeat.

    Writes an anchor at `version` first when it has none. A crash in between leaves an anchor more, and nothing less.
    """
    chain.manifest(version)
    horizon = oldest_kept(chain)
    if version <= horizon:
        return horizon
    if not any(hop.base_version is None for hop in Ways(chain)(version)):
        write_compaction(chain, CompactionPlan(version, (), {}, writes_anchor=True), coding=ANCHOR_CODING)
    move_horizon(chain, version)
    return version
