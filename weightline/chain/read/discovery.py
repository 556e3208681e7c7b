"""Finds the chains below a folder or a bucket prefix: what a caller may have meant by a URL without versions."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from weightline.chain.read.history import Chain
from weightline.errors import ChainEmptyError, InputError, StorageError
from weightline.format import keys
from weightline.store import Store, open_store
from weightline.store.local import LocalStore

_logger = logging.getLogger(__name__)

#: A chain of a run is at `runs/<run>/bucket/<chain>`.
MAX_DEPTH = 3
MAX_NAMED = 20
#: Bounds on the search: folders that are looked into, and listings that a remote store is asked for.
_MAX_FOLDERS = 2_000
_MAX_LISTINGS = 60
_PATIENCE_SECONDS = 5.0
_PREFIXES = frozenset(
    prefix.partition("/")[0]
    for prefix in (
        *keys.SHARED, keys.COMMITS, keys.FORMATS, keys.HISTORY, keys.PAYLOADS, keys.PROBES, keys.RECORDS, keys.REFS,
        keys.SHORTCUTS, keys.SIGNATURES, keys.TIP_HINT,
    )
)  # fmt: skip


def empty_chain_error(url: str) -> ChainEmptyError:
    """Returns the error of a URL that names no version: it lists the chains below that folder, or beside it."""
    store = open_store(url, _PATIENCE_SECONDS)
    for place in (store.url, *_parents(store.url)):
        names = chains_below(place)
        if names:
            others = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            found = f"Chains below {place}: {', '.join(names[:MAX_NAMED])}{others}"
            break
    else:
        found = f"There is no chain below {next(iter(_parents(store.url)), store.url)} either"
    return ChainEmptyError(f"{store.url} holds no version. {found}", chain=store.url)


def warn_if_empty(chain: Chain) -> None:
    """Logs that a server waits for the chain's first version, with the chains that may have been meant."""
    try:
        is_empty = chain.tip_version() is None
    except StorageError:
        return  # The server reports it, and tries again.
    if is_empty:
        _logger.warning("waiting for the first version: %s", empty_chain_error(chain.url))


def chains_below(url: str) -> tuple[str, ...]:
    """Returns the names, relative to `url`, of the chains at most three levels below it. Reads only.

    Empty where the place cannot be listed. The search is bounded, so it may miss some in a large place.
    """
    try:
        store = open_store(url, _PATIENCE_SECONDS)
        if isinstance(store, LocalStore):
            budget = [_MAX_FOLDERS]
            return tuple(str(folder.relative_to(store.root)) for folder in folders_below(store.root, budget=budget))
        return tuple(_prefixes_below(store))
    except (InputError, StorageError):
        return ()


def folders_below(root: Path, depth: int = MAX_DEPTH, budget: list[int] | None = None) -> Iterator[Path]:
    """Yields the folders below `root`, not `root` itself, that contain commits. StorageError.

    `budget`: a list of one number, of folders that may be looked into. None: as many as there are.
    """
    try:
        entries = sorted(e.path for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except OSError as error:
        raise StorageError(f"{root}: {error.strerror}", url=root.as_uri(), key="") from error
    for path in entries:
        if budget is not None:
            if not budget[0]:
                return
            budget[0] -= 1
        if Path(path, keys.COMMITS).is_dir():
            yield Path(path)
        elif depth > 1:
            yield from folders_below(Path(path), depth - 1, budget)


def _prefixes_below(store: Store) -> Iterator[str]:
    """Yields the prefixes of chains in key order. A listing ends at the first object of a chain, and skips the rest."""
    after = ""
    for _ in range(_MAX_LISTINGS):
        info = next(store.list("", after), None)
        if info is None:
            return
        *folders, _name = info.key.split("/")
        place = next((at for at, part in enumerate(folders[: MAX_DEPTH + 1]) if part in _PREFIXES), None)
        if place is None:
            after = info.key
            continue
        prefix = "/".join(folders[:place])
        if prefix and next(store.list(f"{prefix}/{keys.COMMITS}"), None) is not None:
            yield prefix
        # "0" follows "/" in key order.
        after = f"{prefix or folders[0]}0"


def _parents(url: str) -> tuple[str, ...]:
    """Returns the place that contains this one; for a folder that does not exist, the nearest one that does."""
    store = open_store(url)
    if isinstance(store, LocalStore):
        parents = store.root.parents
        return tuple(parent.as_uri() for parent in parents if parent.is_dir())[:1]
    parts = urlsplit(url)
    path = parts.path.rstrip("/").rpartition("/")[0]
    return (f"{parts.scheme}://{parts.netloc}{quote(path, safe='/%')}",) if parts.path.strip("/") else ()
