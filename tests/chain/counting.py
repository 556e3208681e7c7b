"""A store that counts what a bucket would be asked: requests by verb and by the first part of the key."""

from __future__ import annotations

from collections import Counter

from weightline.store import Store
from weightline.testing.faults import FaultStore


class CountingStore(FaultStore):
    """Implements `Store` over another one."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner, self._count)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.keys: Counter[tuple[str, str]] = Counter()

    def num(self, verb: str, folder: str | None = None) -> int:
        """Requests of one verb, below one folder of the chain or below any."""
        return sum(n for (v, f), n in self.requests.items() if v == verb and folder in (None, f))

    def reset(self) -> None:
        self.requests.clear()
        self.keys.clear()

    def _count(self, _number: int, verb: str, key: str) -> None:
        self.requests[verb, key.partition("/")[0]] += 1
        self.keys[verb, key] += 1
