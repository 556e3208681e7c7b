"""Records: the results of work on committed versions, such as evaluations, stored in the chain's bucket.

A record is a JSON object with at least `status`: `done`, `skipped`, `failed` or `rolled_back`. Records are create-only:
the first one stays, which makes every consumer keyed by (chain, version) safe to repeat. Records, refs and horizons
are not signed, so `read_stored` checks every field of what it reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.chain.read.history import Chain
from weightline.errors import CorruptError, InputError, NotFoundError, ObjectExistsError
from weightline.format import keys
from weightline.format.documents import MAX_NOTE_NBYTES, MAX_RECORD_NBYTES, Count, parse_json
from weightline.format.manifest import utc_now

EVALUATIONS = "evaluations"

REFRESHES = "refreshes"

ROLLOUTS = "rollouts"

#: See weightline.rollouts.record. Not to be confused with `rollouts`, the plans of a fleet.
SAMPLES = "samples"

GAPS = "gaps"

LOGGED = "logged"

Record = dict[str, Any]


class Stored(BaseModel):
    """Base class of stored JSON objects. Types are checked strictly; fields of later releases are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


Object = TypeVar("Object", bound=Stored)


def read_stored(chain: Chain, key: str, cls: type[Object]) -> Object:
    """Returns the object under a key. NotFoundError; CorruptError for bytes that are no such object."""
    raw = chain.store.get(key, MAX_RECORD_NBYTES if cls is _Record else MAX_NOTE_NBYTES)
    try:
        return cls.model_validate(parse_json(raw))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        why = f"{where and f'{where}: '}{first['msg']}"
        raise CorruptError(f"{key} in {chain.url} cannot be read: {why}", key=key) from error
    except ValueError as error:
        raise CorruptError(f"{key} in {chain.url} cannot be read: {error}", key=key) from error


def require_key(chain: Chain, key: str, claimed: str) -> None:
    """Raises CorruptError unless the object's own fields lead to the key that it is stored under."""
    if claimed != key:
        raise CorruptError(f"{key} in {chain.url} holds the object of {claimed}", key=key)


class _Record(Stored):
    """The fields that every record has. All other fields, including `kind`, are the writer's own."""

    model_config = ConfigDict(extra="allow")

    version: Count
    name: str
    status: str


def write_record(chain: Chain, kind: str, version: int, name: str, record: Record) -> Record:
    """Writes the record with the time added. Returns the stored record: this one, or an earlier one. Safe to repeat.

    InputError for a record that readers would refuse.
    """
    stamped = {"kind": kind, "version": version, "name": name, "recorded_at": utc_now(), **record}
    key = keys.record(kind, version, name)
    body = json.dumps(stamped, indent=1, sort_keys=True).encode()
    try:
        if len(body) > MAX_RECORD_NBYTES:
            raise ValueError(f"it has {len(body)} bytes, and {MAX_RECORD_NBYTES} are read")
        parse_json(body)
    except ValueError as error:
        raise InputError(f"the record {key} cannot be written: {error}", name=name) from error
    try:
        chain.store.put_if_absent(key, body)
    except ObjectExistsError:
        return _parse(chain, key)
    return stamped


def read_record(chain: Chain, kind: str, version: int, name: str) -> Record | None:
    """Returns the record; None when there is none. CorruptError for a broken one."""
    try:
        return _parse(chain, keys.record(kind, version, name))
    except NotFoundError:
        return None


def read_records(chain: Chain, kind: str, first: int = 0) -> list[Record]:
    """Returns every record of a kind from version `first` on, ordered by version and name."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    return [_parse(chain, info.key) for info in chain.store.list(prefix, f"{prefix}{keys.padded(first)}")]


def read_version_records(chain: Chain, kind: str, version: int) -> list[Record]:
    """Returns the records of a kind of one version, ordered by name. Reads no other record."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/{keys.padded(version)}/"
    return [_parse(chain, info.key) for info in chain.store.list(prefix)]


def newest_records(chain: Chain, kind: str, name: str, last: int) -> Iterator[Record]:
    """Yields the records of this kind and name of versions up to `last`, newest first. Each is read when asked for."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    found = [info.key for info in chain.store.list(prefix) if info.key.endswith(f"/{name}.json")]
    for key in reversed(found):
        version = keys.version_of(key.removeprefix(prefix).partition("/")[0])
        if version is not None and version <= last:
            yield _parse(chain, key)


def recorded_versions(chain: Chain, kind: str) -> frozenset[int]:
    """Returns the versions that have a record of this kind. Costs one listing; no record is read."""
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    found = (keys.version_of(info.key.removeprefix(prefix).partition("/")[0]) for info in chain.store.list(prefix))
    return frozenset(version for version in found if version is not None)


def last_recorded(chain: Chain, kind: str, name: str, below: int) -> int | None:
    """Returns the newest version below `below` that has a record of this kind and name, by the keys.

    Lists the keys of the 64 versions below first, then of eight times as many, and so on: a name that has a record at
    all mostly has a recent one.
    """
    prefix = f"{keys.RECORDS}{keys.checked_name(kind)}/"
    last, num_versions = below, 64
    while last > 0:
        first, found = max(0, last - num_versions), None
        for info in chain.store.list(prefix, f"{prefix}{keys.padded(first)}"):
            digits, _, file_name = info.key.removeprefix(prefix).partition("/")
            version = keys.version_of(digits)
            if version is not None and version >= last:
                break
            if version is not None and file_name == f"{name}.json":
                found = version
        if found is not None:
            return found
        last, num_versions = first, 8 * num_versions
    return None


def _parse(chain: Chain, key: str) -> Record:
    """Reads a record. CorruptError for bytes that are no record, or the record of another key."""
    record = read_stored(chain, key, _Record)
    kind = key.removeprefix(keys.RECORDS).partition("/")[0]
    require_key(chain, key, f"{keys.RECORDS}{kind}/{keys.padded(record.version)}/{record.name}.json")
    return record.model_dump()
