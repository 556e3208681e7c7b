"""Refs: names for versions, and the horizon, the oldest version that history keeps. Both are append-only records.

A name's history is therefore never lost. A tag is a ref that never moves.
"""

from __future__ import annotations

import re

from weightline.chain.read.history import Chain
from weightline.chain.read.records import Stored, read_stored, require_key
from weightline.errors import (
    ConflictError,
    CorruptError,
    InputError,
    ManifestError,
    NotFoundError,
    ObjectExistsError,
)
from weightline.format import keys
from weightline.format.documents import Count, Label
from weightline.format.manifest import Hex128, utc_now

#: A version number, which `resolve` accepts in place of a ref's name.
_VERSION = re.compile(r"[0-9]{1,20}")

TIP = "tip"

NOTHING = "nothing"


class Ref(Stored):
    """One move of a ref: a name and the version that it refers to from then on."""

    name: str
    number: Count
    version: Count
    commit_id: Hex128
    created_at: Label
    is_tag: bool = False


def move_ref(chain: Chain, name: str, version: int, *, is_tag: bool = False) -> Ref:
    """Moves a name to a version. Repeating the newest move changes nothing.

    A ref becomes a tag by a move to its current version. InputError when the name is a tag and this would move or
    release it, and for a name that is reserved or a number. A name whose version is gone moves in any case.
    ConflictError when another writer moved it at the same moment, or when the version was collected at that moment: the
    name then refers to a version that is gone, and can be moved or removed.
    """
    _require_name(name)
    newest = newest_move(chain, name)
    header = chain.header(version)
    if newest is not None:
        stays = newest.commit_id == header.commit_id
        if stays and newest.is_tag == is_tag:
            return newest
        if (newest.is_tag or (is_tag and not stays)) and names_version(chain, newest):
            raise InputError(
                f"{name!r} is a {'tag' if newest.is_tag else 'ref'} at version {newest.version} of {chain.url}: a tag "
                "never moves, choose another name",
                name=name, version=newest.version,
            )  # fmt: skip
    ref = Ref(
        name=name, number=0 if newest is None else newest.number + 1, version=version, commit_id=header.commit_id,
        created_at=utc_now(), is_tag=is_tag,
    )  # fmt: skip
    try:
        chain.store.put_if_absent(keys.ref(name, ref.number), ref.model_dump_json().encode())
    except ObjectExistsError as error:
        raise ConflictError(
            f"another writer moved {name!r} at the same moment: check where it is now, and repeat", name=name
        ) from error
    if chain.store.head(keys.commit(version)) is None:
        raise ConflictError(
            f"version {version} of {chain.url} was collected while {name!r} was moved to it: move {name!r} to another "
            "version, or remove it with `weightline repair`",
            name=name,
        )
    return ref


def names_version(chain: Chain, ref: Ref) -> bool:
    """Returns whether the version of a ref is in the chain. Reads the bucket, not what this process remembers of it."""
    try:
        found = chain.reopened().header(ref.version)
    except (NotFoundError, ManifestError):
        return False
    return found.commit_id == ref.commit_id


def _require_name(name: str) -> None:
    if name in (TIP, NOTHING) or (name.isascii() and name.isdigit()):
        raise InputError(f"{name!r} cannot be a ref: numbers, 'tip' and 'nothing' are reserved", name=name)


def newest_move(chain: Chain, name: str, after: int = -1) -> Ref | None:
    """Returns the newest move of the name after move number `after`; None without one. One listing and one get."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    start_after = keys.ref(name, after) if after >= 0 else ""
    found = [info.key for info in chain.store.list(prefix, start_after) if keys.is_ref(info.key)]
    return read_move(chain, found[-1]) if found else None


def history_of(chain: Chain, name: str) -> list[Ref]:
    """Returns every move of the name, oldest first. Empty when there is no such name."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    return [read_move(chain, info.key) for info in chain.store.list(prefix) if keys.is_ref(info.key)]


def current_refs(chain: Chain) -> dict[str, Ref]:
    """Returns the newest move of every ref, by name."""
    refs = (read_move(chain, key) for key in newest_moves(chain))
    return {ref.name: ref for ref in refs}


def newest_moves(chain: Chain) -> tuple[str, ...]:
    """Returns the key of the newest move of every ref. Costs one listing; no object is read."""
    newest = {info.key.rpartition("/")[0]: info.key for info in chain.store.list(keys.REFS) if keys.is_ref(info.key)}
    return tuple(newest.values())


def read_move(chain: Chain, key: str) -> Ref:
    """Reads a move of a ref. CorruptError for bytes that are no such move, or the move of another key."""
    ref = read_stored(chain, key, Ref)
    require_key(chain, key, f"{keys.REFS}{ref.name}/{keys.padded(ref.number)}.json")
    return ref


def resolve(chain: Chain, text: str) -> int:
    """Returns the version that a number, `tip` or the name of a ref refers to. NotFoundError for an unknown ref."""
    if _VERSION.fullmatch(text):
        return chain.header(int(text)).version
    if text == TIP:
        return chain.tip_header().version
    newest = newest_move(chain, text)
    if newest is None:
        raise NotFoundError(f"{chain.url} has no ref {text!r}: give a version number, 'tip' or a name", key=text)
    return newest.version


class Horizon(Stored):
    """A record of the horizon: versions before `oldest_kept` may be collected from then on."""

    oldest_kept: Count
    created_at: Label


def oldest_kept(chain: Chain) -> int:
    """Returns the horizon; 0 when no history was ever expired. CorruptError for an object that is no such record.

    Costs one listing: a record that this chain object has read is not fetched again.
    """
    found = [info.key for info in chain.store.list(keys.HISTORY)]
    for key in found:
        if key not in chain.horizons:
            chain.horizons[key] = read_stored(chain, key, Horizon).oldest_kept
    return max((chain.horizons[key] for key in found), default=0)


def require_horizon(chain: Chain, horizon: int, tip: int | None) -> None:
    """Raises CorruptError for a horizon beyond the tip, by which no version at all would be kept.

    Read the horizon before the tip: both only grow. A chain without versions has no horizon but 0.
    """
    if horizon > (-1 if tip is None else tip) and (horizon or tip is not None):
        there = "it holds no version" if tip is None else f"its tip is {tip}"
        raise CorruptError(
            f"the horizon of {chain.url} is version {horizon}, and {there}: records below {keys.HISTORY} are left over "
            "from another chain. Nothing is collected. Delete them, or commit to a new prefix",
            key=keys.HISTORY,
        )


def move_horizon(chain: Chain, version: int) -> None:
    """Appends a record of the horizon. ConflictError when another process appended one at the same moment."""
    number = sum(1 for _ in chain.store.list(keys.HISTORY))
    record = Horizon(oldest_kept=version, created_at=utc_now())
    try:
        chain.store.put_if_absent(f"{keys.HISTORY}{keys.padded(number)}.json", record.model_dump_json().encode())
    except ObjectExistsError as error:
        raise ConflictError("another process expired history at the same moment: check, and repeat") from error
