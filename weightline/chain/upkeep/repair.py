"""Removes what is broken and keeps nothing alive: shortcuts that do not hold what they say, and names of lost versions.

Every version can be reached without shortcuts, so a broken one is worth nothing; `compact` writes it again where one
is worth its bytes. A name whose version is gone keeps gc from collecting anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weightline.chain.read.history import Chain
from weightline.chain.read.refs import names_version, read_move
from weightline.chain.upkeep.verify import Finding
from weightline.errors import CorruptError, NotFoundError
from weightline.format import keys


@dataclass(frozen=True, slots=True)
class Repair:
    """The objects that a repair removes, with the finding that condemns them."""

    shortcuts: tuple[Finding, ...]
    refs: tuple[Finding, ...]
    left: tuple[Finding, ...]
    """Findings that no removal mends."""

    @property
    def removed(self) -> tuple[Finding, ...]:
        return (*self.shortcuts, *self.refs)


def plan_repair(findings: Iterable[Finding]) -> Repair:
    """Sorts the findings of `verify_chain`. Pure."""
    shortcuts: dict[str, Finding] = {}
    refs: dict[str, Finding] = {}
    left: list[Finding] = []
    for finding in findings:
        key = finding.key or ""
        if key.startswith(keys.SHORTCUTS):
            shortcuts.setdefault(key, finding)
        elif key.startswith(keys.REFS):
            refs.setdefault(key, finding)
        else:
            left.append(finding)
    return Repair(tuple(shortcuts.values()), tuple(refs.values()), tuple(left))


def write_repair(chain: Chain, repair: Repair) -> None:
    """Removes what was planned. Safe to repeat, also after a crash.

    A move of a ref that cannot be read is removed alone: the move before it is valid then. Of a ref whose version is
    gone every move is removed, the newest last, so that a crash does not bring an older one back. One that was moved to
    a version meanwhile stays.
    """
    for finding in repair.shortcuts:
        chain.store.delete(finding.key or "")
    for finding in repair.refs:
        _remove_ref(chain, finding.key or "")


def _remove_ref(chain: Chain, key: str) -> None:
    try:
        move = read_move(chain, key)
    except CorruptError:
        chain.store.delete(key)
        return
    except NotFoundError:
        return
    prefix = keys.ref(move.name, 0).rpartition("/")[0] + "/"
    moves = [info.key for info in chain.store.list(prefix)]
    if moves and moves[-1] == key and not names_version(chain, move):
        for one in moves:
            chain.store.delete(one)
