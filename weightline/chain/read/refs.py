"""Refs: names for versions, and the horizon, the oldest version that history keeps. Both are append-only records.

A name's history is therefore never lost. A tag is a ref that never moves.
"""

from __future__ import annotations

import re

from weightline.chain.read.history import Chain
from weightline.chain.read.records import Stored, read_stored, require_key
from weightline.errors import ConflictError, InputError, NotFoundError, ObjectExistsError
from weightline.format import keys
from weightline.format.manifest import Count, Hex128, utc_now

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
    created_at: str
    is_tag: bool = False


def move_ref(chain: Chain, name: str, version: int, *, is_tag: bool = False) -> Ref:
    """Moves a name to a version. Repeating the newest move changes nothing.

    A ref becomes a tag by a move to its current version. InputError when the name is a tag and this would move or
    release it, and for a name that is reserved or a number. ConflictError when another writer moved it at the same
    moment.
    """
    _require_name(name)
    newest = newest_move(chain, name)
    manifest = chain.manifest(version)
    if newest is not None:
        stays = newest.commit_id == manifest.commit_id
        if stays and newest.is_tag == is_tag:
            return newest
        if newest.is_tag or (is_tag and not stays):
            raise InputError(
                f"{name!r} is a {'tag' if newest.is_tag else 'ref'} at version {newest.version} of {chain.url}: a tag "
                "never moves, choose another name",
                name=name, version=newest.version,
            )  # fmt: skip
    ref = Ref(
        name=name, number=0 if newest is None else newest.number + 1, version=version, commit_id=manifest.commit_id,
        created_at=utc_now(), is_tag=is_tag,
    )  # fmt: skip
    try:
        chain.store.put_if_absent(keys.ref(name, ref.number), ref.model_dump_json().encode())
    except ObjectExistsError as error:
        raise ConflictError(
            f"another writer moved {name!r} at the same moment: check where it is now, and repeat", name=name
        ) from error
    return ref


def _require_name(name: str) -> None:
    if name in (TIP, NOTHING) or (name.isascii() and name.isdigit()):
        raise InputError(f"{name!r} cannot be a ref: numbers, 'tip' and 'nothing' are reserved", name=name)


def newest_move(chain: Chain, name: str, after: int = -1) -> Ref | None:
    """Returns the newest move of the name after move number `after`; None without one. One listing and one get."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    start_after = keys.ref(name, after) if after >= 0 else ""
    found = [info.key for info in chain.store.list(prefix, start_after)]
    return _read(chain, found[-1]) if found else None


def history_of(chain: Chain, name: str) -> list[Ref]:
    """Returns every move of the name, oldest first. Empty when there is no such name."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    return [_read(chain, info.key) for info in chain.store.list(prefix)]


def current_refs(chain: Chain) -> dict[str, Ref]:
    """Returns the newest move of every ref, by name."""
    newest = {info.key.rpartition("/")[0]: info.key for info in chain.store.list(keys.REFS)}
    refs = (_read(chain, key) for key in newest.values())
    return {ref.name: ref for ref in refs}


def _read(chain: Chain, key: str) -> Ref:
    """Reads a move of a ref. CorruptError for bytes that are no such move, or the move of another key."""
    ref = read_stored(chain, key, Ref)
    require_key(chain, key, f"{keys.REFS}{ref.name}/{keys.padded(ref.number)}.json")
    return ref


def resolve(chain: Chain, text: str) -> int:
    """Returns the version that a number, `tip` or the name of a ref refers to. NotFoundError for an unknown ref."""
    if _VERSION.fullmatch(text):
        return chain.manifest(int(text)).version
    if text == TIP:
        return chain.tip().version
    newest = newest_move(chain, text)
    if newest is None:
        raise NotFoundError(f"{chain.url} has no ref {text!r}: give a version number, 'tip' or a name", key=text)
    return newest.version


class Horizon(Stored):
    """A record of the horizon: versions before `oldest_kept` may be collected from then on."""

    oldest_kept: Count
    created_at: str


def oldest_kept(chain: Chain) -> int:
    """Returns the horizon; 0 when no history was ever expired. CorruptError for an object that is no such record."""
    records = [read_stored(chain, info.key, Horizon) for info in chain.store.list(keys.HISTORY)]
    return max((record.oldest_kept for record in records), default=0)


def move_horizon(chain: Chain, version: int) -> None:
    """Appends a record of the horizon. ConflictError when another process appended one at the same moment."""
    number = sum(1 for _ in chain.store.list(keys.HISTORY))
    record = Horizon(oldest_kept=version, created_at=utc_now())
    try:
        chain.store.put_if_absent(f"{keys.HISTORY}{keys.padded(number)}.json", record.model_dump_json().encode())
    except ObjectExistsError as error:
        raise ConflictError("another process expired history at the same moment: check, and repeat") from error
