"""A bar for people who wait for a bucket; nothing where standard error is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from weightline.store.transfers import watching


@contextmanager
def transferring(what: str, total_nbytes: Callable[[], int] | None = None) -> Iterator[None]:
    """Show the bytes that move to or from any bucket until the block ends. The total is asked for only when shown."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None if total_nbytes is None else total_nbytes())
        with watching(lambda nbytes: progress.advance(task, nbytes)):
            yield
