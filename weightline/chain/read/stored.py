"""JSON objects beside a chain's versions: refs, horizons, records. Nobody signs them, so nothing is assumed of them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from weightline.chain.read.history import Chain
from weightline.errors import CorruptError


class Stored(BaseModel):
    """Base of such objects: types are exact, fields of later releases are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


Object = TypeVar("Object", bound=Stored)


def read_stored(chain: Chain, key: str, cls: type[Object]) -> Object:
    """The object under a key. NotFoundError; CorruptError for bytes that are no such object."""
    raw = chain.store.get(key)
    try:
        return cls.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(
            f"{key} in {chain.url} cannot be read: {where and f'{where}: '}{first['msg']}", key=key
        ) from error


def require_key(chain: Chain, key: str, claimed: str) -> None:
    """CorruptError unless the object says that it belongs where it stands."""
    if claimed != key:
        raise CorruptError(f"{key} in {chain.url} holds what belongs under {claimed}", key=key)
