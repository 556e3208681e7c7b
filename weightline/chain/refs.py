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
    moves = history_of(chain, name)
    manifest = chain.manifest(version)
    if moves and moves[-1].commit_id == manifest.commit_id:
        return moves[-1]
    if moves and (moves[-1].is_tag or is_tag):
        raise InputError(
            f"{name!r} stands for version {moves[-1].version} of {chain.url}: a tag never moves, choose another name",
            name=name,
            version=moves[-1].version,
        )
    ref = Ref(name, len(moves), version, manifest.commit_id, utc_now(), is_tag)
    try:
        chain.store.put_if_absent(keys.ref(name, ref.number), json.dumps(asdict(ref)).encode())
    except ObjectExistsError as error:
        raise ConflictError(f"another writer moved {name!r} at the same moment: look, and repeat", name=name) from error
    return ref


def history_of(chain: Chain, name: str) -> list[Ref]:
    """Every move of the name, oldest first. Empty when there is no such name."""
    prefix = keys.ref(name, 0).rpartition("/")[0] + "/"
    return [Ref(**json.loads(chain.store.get(info.key))) for info in chain.store.list(prefix)]


def current_refs(chain: Chain) -> dict[str, Ref]:
    """Where every name stands now."""
    refs = (Ref(**json.loads(chain.store.get(info.key))) for info in chain.store.list(keys.REFS))
    return {ref.name: ref for ref in sorted(refs, key=lambda ref: ref.number)}


def resolve(chain: Chain, text: str) -> int:
    """The version that a person means by a number, `tip`, or the name of a ref."""
    if text.isdigit():
        return chain.manifest(int(text)).version
    if text == "tip":
        return chain.tip().version
    moves = history_of(chain, text)
    if not moves:
        raise NotFoundError(f"{chain.url} has no ref {text!r}: give a version number, 'tip' or a name", key=text)
    return moves[-1].version
