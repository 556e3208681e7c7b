"""Reads the rows of a chain from its bucket. Reads only."""

from __future__ import annotations

from weightline.chain import Chain
from weightline.chain.read.records import EVALUATIONS, LOGGED, REFRESHES, read_records
from weightline.format import keys
from weightline.lineage.edges import Shortcut
from weightline.lineage.rows import LineageRow, lineage_rows


def read_lineage(chain: Chain, max_versions: int | None = None) -> tuple[LineageRow, ...]:
    """Returns the rows of the chain's newest versions (all for None), oldest first. Headers are read one by one."""
    tip = chain.tip_version()
    if tip is None:
        return ()
    first = 0 if max_versions is None else max(0, tip - max_versions + 1)
    evaluations, refreshes, logged = (read_records(chain, kind, first) for kind in (EVALUATIONS, REFRESHES, LOGGED))
    return lineage_rows(chain.headers(first, tip), evaluations, refreshes, logged)


def read_shortcuts(chain: Chain) -> tuple[Shortcut, ...]:
    """Returns the shortcuts of the chain. Lists their keys and reads no object."""
    found = (keys.ends_of_shortcut(info.key) for info in chain.store.list(keys.SHORTCUTS))
    return tuple(ends for ends in found if ends is not None)
