"""Names for versions: append-only records, so that a name's history is never lost. A tag is a ref that never moves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from weightline.chain.commit import utc_now
from weightline.chain.history import Chain
from weightline.errors import ConflictError, InputError, NotFoundError, ObjectExistsError
from weightline.format import keys


@dataclass(frozen=True, slots=True)
class Ref:
    """One move of a name."""

    name: str
    number: int
    version: int
    commit_id: str
    created_at: str
    is_tag: bool = False


def move_ref(chain: Chain, name: str, version: int, *, is_tag: bool = False) -> Ref:
    """Let the name stand for the version from now on. Repeating the newest move changes nothing.

    InputError when the name is a tag and stands for another version; ConflictError when another writer moved it at the
    same moment.
    """
    newest = newest_move(chain, name)
    manifest = chain.manifest(version)
    if newest is not None and newest.commit_id == manifest.commit_id:
        return newest
    if newest is not None and (newest.is_tag or is_tag):
        raise InputError(
            f"{name!r} stands for version {newest.version} of {chain.url}: a tag never moves, choose another name",
            name=name,
            version=newest.version,
        )
    number = 0 if newest is None else newest.number + 1
    ref = Ref(name, number, version, manifest.commit_id, utc_now(), is_tag)
    try:
        chain.store.put_if_absent(keys.ref(name, ref.number), json.dumps(asdict(ref)).encode())
    except ObjectExistsError as error:
        raise ConflictError(f"another writer moved {name!r} at the same moment: look, and repeat", name=name) from error
    return ref


def newest_move(chain: Chain, name: str, after: int = -1) -> Ref | None:
    """The newest move of the name after its move number `after`; None when there is none. One listing, one object."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    start_after = keys.ref(name, after) if after >= 0 else ""
    found = [info.key for info in chain.store.list(prefix, start_after)]
    return Ref(**json.loads(chain.store.get(found[-1]))) if found else None


def history_of(chain: Chain, name: str) -> list[Ref]:
    """Every move of the name, oldest first. Empty when there is no such name."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    return [Ref(**json.loads(chain.store.get(info.key))) for info in chain.store.list(prefix)]


def current_refs(chain: Chain) -> dict[str, Ref]:
    """Where every name stands now."""
    newest = {info.key.rpartition("/")[0]: info.key for info in chain.store.list(keys.REFS)}
    refs = (Ref(**json.loads(chain.store.get(key))) for key in newest.values())
    return {ref.name: ref for ref in refs}


def resolve(chain: Chain, text: str) -> int:
    """The version that a person means by a number, `tip`, or the name of a ref."""
    if text.isdigit():
        return chain.manifest(int(text)).version
    if text == "tip":
        return chain.tip().version
    newest = newest_move(chain, text)
    if newest is None:
        raise NotFoundError(f"{chain.url} has no ref {text!r}: give a version number, 'tip' or a name", key=text)
    return newest.version
