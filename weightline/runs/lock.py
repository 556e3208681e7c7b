"""A lock of this host that lets one training at a time write to a chain.

The kernel releases the lock when its holder ends in any way. It needs no server, so no server can take it from a
training that runs. It belongs to the bucket, not to one spelling of its URL. Between hosts, the work queue `training`
admits one run at a time, and in the bucket the second writer of a version loses.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from weightline.errors import InputError
from weightline.files import exclusive_lock
from weightline.store import open_store


@contextmanager
def exclusive_training_lock(chain_url: str, run_id: str) -> Iterator[None]:
    """Holds the chain's lock during the block. If it is taken, raises InputError at once, naming the holder."""
    path = lock_path(chain_url)
    path.parent.mkdir(parents=True, exist_ok=True)
    holder_path = path.with_suffix(".holder")
    with ExitStack() as held:
        try:
            held.enter_context(exclusive_lock(path))
        except BlockingIOError:
            holder = _read_holder(holder_path)
            raise InputError(
                f"chain: {chain_url} is being trained by {holder}: wait for its end, or name another chain",
                field="chain", chain=chain_url,
            ) from None  # fmt: skip
        holder_path.write_text(f"run {run_id} (process {os.getpid()})")
        yield


def lock_path(chain_url: str) -> Path:
    """Returns this host's lock file for the chain, the same one for every spelling of its URL."""
    digest = hashlib.sha256(open_store(chain_url).url.rstrip("/").encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"weightline-locks-{os.getuid()}" / f"{digest}.lock"


def _read_holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another run"
    except OSError:
        return "another run"
