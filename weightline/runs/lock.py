"""One training a chain: whoever trains holds a lock of this host. Free of Prefect.

The lock is the kernel's, so it goes with its holder, however that ends; no server has to be there, and none can take it
away from a training that goes on. It goes by the bucket, not by how its URL is spelled. Between hosts, the queue
`training` lets one run go on at a time, and the bucket has the last word: the second writer of a version loses.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightline.errors import InputError
from weightline.store import open_store


@contextmanager
def exclusive_training_lock(chain_url: str, run_id: str) -> Iterator[None]:
    """Hold the chain's lock. InputError at once, naming the run that has it, when it is taken."""
    path = lock_path(chain_url)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another run"
            raise InputError(
                f"chain: {chain_url} is being trained by {holder}: wait for its end, or name another chain",
                field="chain", chain=chain_url,
            ) from None  # fmt: skip
        file.truncate(0)
        file.write(f"run {run_id} (process {os.getpid()})")
        file.flush()
        yield


def lock_path(chain_url: str) -> Path:
    """Where this host keeps the chain's lock: the same file for every URL that leads to the chain."""
    digest = hashlib.sha256(open_store(chain_url).url.rstrip("/").encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"weightline-locks-{os.getuid()}" / f"{digest}.lock"
