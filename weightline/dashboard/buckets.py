"""Finds the chains to show: each URL names one, and a local folder of chains names all of them. Reads only."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain
from weightline.chain.read.discovery import folders_below
from weightline.format import keys
from weightline.store import open_store
from weightline.store.local import LocalStore

#: Number of chains that are shown at most.
MAX_CHAINS = 200
#: Retry deadline of the stores. It is short, since the page reports an unavailable bucket and retries by itself.
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class FoundChains:
    """The chains to show, and the number of further ones: the oldest of those below folders."""

    chains: tuple[Chain, ...]
    num_left_out: int = 0


def find_chains(urls: Iterable[str]) -> FoundChains:
    """Returns the chains that the URLs name now, in the given order; those below a folder newest first.

    A URL without any chain counts as an empty chain, except for a local URL that ends in a slash, which always names a
    folder of chains. InputError for a URL that no store supports.
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
    """Sorts by the time at which the folder got its newest entry, which is about when the chain began."""
    dated = []
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            dated.append((-folder.stat().st_mtime, folder))
    return [folder for _, folder in sorted(dated)]


def chain_id(chain: Chain) -> str:
    """Returns a short, stable id that is safe in a URL: the chain's name and a part of a hash of its URL."""
    name = re.sub(r"[^a-z0-9]+", "-", chain.name.lower()).strip("-")[:40] or "chain"
    return f"{name}-{hashlib.sha256(chain.url.encode()).hexdigest()[:6]}"


def _chains_below(root: Path) -> Iterator[Path]:
    """Yields the folders below `root` that hold commits; none if `root` itself does."""
    if not (root / keys.COMMITS).is_dir():
        yield from folders_below(root)
