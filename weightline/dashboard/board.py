"""All chains of the page, followed in the background, and the word that something changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from weightline.chain import Chain
from weightline.dashboard.buckets import MAX_CHAINS, FoundChains, chain_id, find_chains
from weightline.dashboard.differing import DifferingCounts
from weightline.dashboard.index import ChainIndex
from weightline.errors import NotFoundError, StorageError
from weightline.store.open import is_remote

POLL_SECONDS = 2.0
#: How long a bucket that cannot be reached is left alone.
_AWAY_SECONDS = 10.0
#: A look that takes longer, the first or a later one, is told on the page while it goes on.
_SILENT_AT_FIRST_SECONDS = 8.0
_SILENT_SECONDS = 30.0
_DISCOVER_SECONDS = 5.0
_NUM_FETCHES = 8

Result = TypeVar("Result")


class Board:
    """Chains by id. `follow` runs for as long as the server does; all else is called from its event loop's thread."""

    def __init__(self, urls: Sequence[str], poll_seconds: float = POLL_SECONDS) -> None:
        self.urls = tuple(urls)
        self.indexes: dict[str, ChainIndex] = {}
        self.num_left_out = 0
        self.differing = DifferingCounts()
        self._poll_seconds = poll_seconds
        self._local_fetches = ThreadPoolExecutor(_NUM_FETCHES, "weightline-fetch")
        self._remote_fetches: dict[str, ThreadPoolExecutor] = {}
        # A thread a chain, and one that looks for chains: a bucket that hangs keeps no other waiting.
        self._refreshes = ThreadPoolExecutor(MAX_CHAINS + 1, "weightline-refresh")
        self._changed = asyncio.Event()
        self._is_ending = False
        self.take(find_chains(self.urls))

    def index(self, identifier: str) -> ChainIndex:
        """NotFoundError for a chain that is not on this page."""
        if identifier not in self.indexes:
            raise NotFoundError(f"no chain {identifier!r} on this page", key=identifier)
        return self.indexes[identifier]

    def take(self, found: FoundChains) -> None:
        """Follow these chains from now on, and no others."""
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
        """By chain: what to compare with what a page was drawn from."""
        return {identifier: index.snapshot.generation for identifier, index in self.indexes.items()}

    async def follow(self) -> None:
        """Refresh every chain now and then, until cancelled."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for identifier, index in self.indexes.items():
                    if identifier not in tasks:
                        tasks[identifier] = asyncio.create_task(self._follow_chain(identifier, index))
                await asyncio.sleep(_DISCOVER_SECONDS)
                with contextlib.suppress(StorageError):
                    self.take(await self._in_thread(lambda: find_chains(self.urls)))
                for gone in tasks.keys() - self.indexes.keys():
                    tasks.pop(gone).cancel()
        finally:
            for task in tasks.values():
                task.cancel()

    async def changes(self, idle_seconds: float = 15.0) -> AsyncIterator[dict[str, int]]:
        """`generations` now and after every change; also when nothing has changed for `idle_seconds`. Ends with us."""
        while not self._is_ending:
            changed = self._changed
            yield self.generations
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), idle_seconds)

    def end_streams(self) -> None:
        """Let everybody go who waits for changes: a server waits for them before it ends."""
        self._is_ending = True
        self._tell()

    def close(self) -> None:
        """Let the threads go."""
        self._refreshes.shutdown(wait=False, cancel_futures=True)
        for pool in (self._local_fetches, *self._remote_fetches.values()):
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetches_of(self, identifier: str, chain: Chain) -> ThreadPoolExecutor:
        """Threads for the chain's objects: its own where they come over a network, which may hang."""
        if not is_remote(chain.store):
            return self._local_fetches
        return self._remote_fetches.setdefault(identifier, ThreadPoolExecutor(_NUM_FETCHES, "weightline-fetch"))

    async def _follow_chain(self, identifier: str, index: ChainIndex) -> None:
        while self.indexes.get(identifier) is index:
            before = index.snapshot.generation
            has_more = await self._look(index)
            if index.snapshot.generation != before:
                self._tell()
            if not has_more:
                is_away = index.snapshot.state == "unreachable"
                await asyncio.sleep(_AWAY_SECONDS if is_away else self._poll_seconds)

    async def _look(self, index: ChainIndex) -> bool:
        """One refresh. When the bucket keeps it waiting, the page says so meanwhile."""
        looking = asyncio.ensure_future(self._in_thread(index.refresh))
        seconds = _SILENT_AT_FIRST_SECONDS if index.snapshot.state == "loading" else _SILENT_SECONDS
        done, _ = await asyncio.wait({looking}, timeout=seconds)
        if not done:
            index.tell_waiting(seconds)
            self._tell()
        return await looking

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._refreshes, work)

    def _tell(self) -> None:
        """Wake everybody who waits, and let them wait for the next."""
        self._changed.set()
        self._changed = asyncio.Event()
