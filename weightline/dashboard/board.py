"""Follows all chains of the page in the background, and notifies the pages of changes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from weightline.chain import Chain
from weightline.dashboard.buckets import MAX_CHAINS, FoundChains, chain_id, find_chains
from weightline.dashboard.differing import DifferingCounts
from weightline.dashboard.index import ChainIndex
from weightline.errors import NotFoundError, StorageError
from weightline.store.open import is_remote

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
#: Pause between attempts to read a bucket that cannot be reached.
_AWAY_SECONDS = 10.0
#: When the first refresh of a chain takes longer than this, the page reports it meanwhile.
_SILENT_AT_FIRST_SECONDS = 8.0
#: The same for later refreshes.
_SILENT_SECONDS = 30.0
_DISCOVER_SECONDS = 5.0
_NUM_FETCHES = 8

Result = TypeVar("Result")


class Board:
    """Chains by id. `follow` runs while the server runs; all other methods are called from its event loop's thread."""

    def __init__(self, urls: Sequence[str], poll_seconds: float = POLL_SECONDS) -> None:
        self.urls = tuple(urls)
        self.indexes: dict[str, ChainIndex] = {}
        self.num_left_out = 0
        self.differing = DifferingCounts()
        self._poll_seconds = poll_seconds
        self._local_fetches = ThreadPoolExecutor(_NUM_FETCHES, "weightline-fetch")
        self._remote_fetches: dict[str, ThreadPoolExecutor] = {}
        # One thread per chain, and one that looks for chains, so that a bucket that hangs does not block the others.
        self._refreshes = ThreadPoolExecutor(MAX_CHAINS + 1, "weightline-refresh")
        self._changed = asyncio.Event()
        self._is_ending = False
        self.take(find_chains(self.urls))

    def index(self, identifier: str) -> ChainIndex:
        """Returns the index of a chain. NotFoundError for a chain that is not on this page."""
        if identifier not in self.indexes:
            raise NotFoundError(f"no chain {identifier!r} on this page", key=identifier)
        return self.indexes[identifier]

    def take(self, found: FoundChains) -> None:
        """Replaces the followed chains by these."""
        self.num_left_out = found.num_left_out
        wanted = {chain_id(chain): chain for chain in found.chains}
        for identifier, chain in wanted.items():
            if identifier not in self.indexes:
                self.indexes[identifier] = ChainIndex(chain, self._fetches_of(identifier, chain))
        for gone in self.indexes.keys() - wanted.keys():
            del self.indexes[gone]
            if gone in self._remote_fetches:
                self._remote_fetches.pop(gone).shutdown(wait=False, cancel_futures=True)

    @property
    def generations(self) -> dict[str, int]:
        """Returns the generation of every chain's snapshot, by which a page sees whether it is outdated."""
        return {identifier: index.snapshot.generation for identifier, index in self.indexes.items()}

    async def follow(self) -> None:
        """Refreshes every chain regularly until it is canceled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for identifier, index in self.indexes.items():
                    if identifier not in tasks:
                        tasks[identifier] = asyncio.create_task(self._follow_chain(identifier, index))
                await asyncio.sleep(_DISCOVER_SECONDS)
                await self._discover()
                for gone in tasks.keys() - self.indexes.keys():
                    tasks.pop(gone).cancel()
        finally:
            for task in tasks.values():
                task.cancel()

    async def _discover(self) -> None:
        """Takes the chains that there are now. After an error the page keeps those that it has."""
        try:
            self.take(await self._in_thread(lambda: find_chains(self.urls)))
        except StorageError as error:
            logger.info("chains cannot be looked for: %s", error)
        except Exception:
            logger.exception("chains cannot be looked for")

    async def changes(self, idle_seconds: float = 15.0) -> AsyncIterator[dict[str, int]]:
        """Yields `generations` now, after every change, and after `idle_seconds` without one. `end_streams` ends it."""
        while not self._is_ending:
            changed = self._changed
            yield self.generations
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), idle_seconds)

    def end_streams(self) -> None:
        """Ends all iterations of `changes`, since a server waits for open streams before it ends."""
        self._is_ending = True
        self._notify()

    def close(self) -> None:
        """Ends the threads, without waiting for them."""
        self._refreshes.shutdown(wait=False, cancel_futures=True)
        for pool in (self._local_fetches, *self._remote_fetches.values()):
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetches_of(self, identifier: str, chain: Chain) -> ThreadPoolExecutor:
        """Returns the threads that fetch a chain's objects. A remote chain has its own, since its bucket may hang."""
        if not is_remote(chain.store):
            return self._local_fetches
        return self._remote_fetches.setdefault(identifier, ThreadPoolExecutor(_NUM_FETCHES, "weightline-fetch"))

    async def _follow_chain(self, identifier: str, index: ChainIndex) -> None:
        while self.indexes.get(identifier) is index:
            before = index.snapshot.generation
            has_more = await self._look(index)
            if index.snapshot.generation != before:
                self._notify()
            if not has_more:
                is_away = index.snapshot.state == "unreachable"
                await asyncio.sleep(_AWAY_SECONDS if is_away else self._poll_seconds)

    async def _look(self, index: ChainIndex) -> bool:
        """Refreshes an index once. Reports on the page when this takes long. Returns whether there is more to read."""
        looking = asyncio.ensure_future(self._in_thread(index.refresh))
        seconds = _SILENT_AT_FIRST_SECONDS if index.snapshot.state == "loading" else _SILENT_SECONDS
        done, _ = await asyncio.wait({looking}, timeout=seconds)
        if not done:
            index.report_waiting(seconds)
            self._notify()
        return await looking

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._refreshes, work)

    def _notify(self) -> None:
        """Wakes all iterations of `changes`, which then wait for the next event."""
        self._changed.set()
        self._changed = asyncio.Event()
