"""Payloads on their way to a remote bucket while the next ones are encoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from weightline.store import Store
from weightline.store.open import is_remote

#: Files that wait on disk or are under way, besides the one being written.
_NUM_AHEAD = 2


class Uploads:
    """Uploads files and removes them. For one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: deque[Future[None]] = deque()
        self._threads = ThreadPoolExecutor(_NUM_AHEAD, thread_name_prefix="weightline-upload")

    def start(self, key: str, path: Path) -> None:
        """Hand a finished file over. Waits while enough are under way; raises what became of earlier ones."""
        if not is_remote(self._store):
            self._upload(key, path)
            return
        while len(self._pending) >= _NUM_AHEAD:
            self._pending.popleft().result()
        self._pending.append(self._threads.submit(self._upload, key, path))

    def finish(self) -> None:
        """Wait until all are durable in the bucket; raises the first error."""
        while self._pending:
            self._pending.popleft().result()

    def close(self) -> None:
        """Give up what has not begun."""
        self._threads.shutdown(cancel_futures=True)

    def _upload(self, key: str, path: Path) -> None:
        self._store.put_file(key, path)
        path.unlink()


@contextmanager
def uploading(store: Store) -> Iterator[Uploads]:
    """When the block ends well, all that was started is in the bucket. Otherwise orphans may be, which gc removes."""
    uploads = Uploads(store)
    try:
        yield uploads
        uploads.finish()
    finally:
        uploads.close()
