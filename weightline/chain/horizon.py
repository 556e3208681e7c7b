"""The horizon: the oldest version that history keeps. Append-only records (`history/`), like a ref."""

from __future__ import annotations

import json

from weightline.chain.commit import utc_now
from weightline.chain.history import Chain
from weightline.errors import ConflictError, ObjectExistsError
from weightline.format import keys


def oldest_kept(chain: Chain) -> int:
    """The horizon. 0 when nothing was ever expired."""
    records = [json.loads(chain.store.get(info.key)) for info in chain.store.list(keys.HISTORY)]
    return max((int(record["oldest_kept"]) for record in records), default=0)


def move_horizon(chain: Chain, version: int) -> None:
    """Append a record. ConflictError when another process appended one at the same moment."""
    number = sum(1 for _ in chain.store.list(keys.HISTORY))
    record = {"oldest_kept": version, "created_at": utc_now()}
    try:
        chain.store.put_if_absent(f"{keys.HISTORY}{keys.padded(number)}.json", json.dumps(record).encode())
    except ObjectExistsError as error:
        raise ConflictError("another process expired history at the same moment: look, and repeat") from error
