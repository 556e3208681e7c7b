"""Which chains to show: each URL names one, and a local folder that holds chains names all of them. Reads only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.errors import StorageError
from weightline.format import keys
from weightline.store import open_store
from weightline.store.local import LocalStore

#: `runs/<run>/bucket/<chain>`: how far below a folder chains are looked for, and how many are shown.
_MAX_DEPTH = 3
MAX_CHAINS = 200
#: A page says soon that a bucket is away, and asks again by itself.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class FoundChains:
    """Chains to show, and how many more there are: the oldest of those below folders."""

    chains: tuple[Chain, ...]
    num_left_out: int = 0


def find_chains(urls: Iterable[str]) -> FoundChains:
    """The chains that the URLs name now, the given order kept; those below a folder newest first.

    InputError for a URL that no store has. Where nothing is yet, an empty chain will be; not so for a URL that ends in
    a slash: it names a folder of chains and nothing else.
    """
    named: dict[str, Chain] = {}
    below: dict[str, Chain] = {}
    for url in urls:
        store = open_store(url, _PATIENCE_SECONDS)
        inside = _newest_first(_chains_below(store.root)) if isinstance(store, LocalStore) else []
        for chain in (Chain(LocalStore(folder)) for folder in inside):
            below.setdefault(chain.url, chain)
        if not inside and not (url.endswith("/") and isinstance(store, LocalStore)):
            named.setdefault(store.url, Chain(store))
    found = list((named | below).values())
    return FoundChains(tuple(found[:MAX_CHAINS]), max(0, len(found) - MAX_CHAINS))


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    """By when something of a new kind was first written there, which is about when the chain began."""
    dated = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            dated.append((-folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(dated)]


def chain_id(chain: Chain) -> str:
    """Short, stable and safe in a URL: the chain's name, and enough of a hash of its URL to tell it from others."""
    name = re.sub(r"[^a-z0-9]+", "-", chain.name.lower()).strip("-")[:40] or "chain"
    return f"{name}-{hashlib.sha256(chain.url.encode()).hexdigest()[:6]}"


def _chains_below(root: Path) -> Iterator[Path]:
    """Folders below `root`, and not `root` itself, that hold commits."""
    if not (root / keys.COMMITS).is_dir():
        yield from _search(root, _MAX_DEPTH)


def _search(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(e.path for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except OSError as error:
        raise StorageError(f"{folder}: {error.strerror}", url=folder.as_uri(), key="") from error
    for path in entries:
        if Path(path, keys.COMMITS).is_dir():
            yield Path(path)
        elif depth > 1:
            yield from _search(Path(path), depth - 1)
