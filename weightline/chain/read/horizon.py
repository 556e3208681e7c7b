"""The horizon: the oldest version that history keeps. Append-only records (`history/`), like a ref."""

from __future__ import annotations

from weightline.chain.read.history import Chain
from weightline.chain.read.stored import Stored, read_stored
from weightline.chain.write.commit import utc_now
from weightline.errors import ConflictError, ObjectExistsError
from weightline.format import keys
from weightline.format.manifest import Count


class Horizon(Stored):
    """One record: from then on, history keeps nothing before this version."""

    oldest_kept: Count
    created_at: str


def oldest_kept(chain: Chain) -> int:
    """The horizon. 0 when nothing was ever expired. CorruptError for an object that is no record of it."""
    records = [read_stored(chain, info.key, Horizon) for info in chain.store.list(keys.HISTORY)]
    return max((record.oldest_kept for record in records), default=0)


def move_horizon(chain: Chain, version: int) -> None:
    """Append a record. ConflictError when another process appended one at the same moment."""
    number = sum(1 for _ in chain.store.list(keys.HISTORY))
    record = Horizon(oldest_kept=version, created_at=utc_now())
    try:
        chain.store.put_if_absent(f"{keys.HISTORY}{keys.padded(number)}.json", record.model_dump_json().encode())
    except ObjectExistsError as error:
        raise ConflictError("another process expired history at the same moment: look, and repeat") from error
