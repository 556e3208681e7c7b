"""The emulator's state and knobs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tests.hub_emulator.buckets import Bucket, Clock
from tests.hub_emulator.content import ContentStore
from tests.hub_emulator.faults import Fault, FaultPlan
from tests.hub_emulator.wire import Request

Role = str  # "write", "read" or "none"


@dataclass(slots=True)
class HubEmulator:
    """One Hub. Everything below `url` is for tests to set or read."""

    content: ContentStore
    url: str = ""
    buckets: dict[str, Bucket] = field(default_factory=dict)
    clock: Clock = time.time
    roles: dict[str, Role] = field(default_factory=dict)
    """What a token may do; a token that is not here may do everything."""
    list_lag_seconds: float = 0.0
    """Listings do not show changes younger than this."""
    info_lag_seconds: float = 0.0
    """Neither does paths-info."""
    failing_paths: Counter[str] = field(default_factory=Counter)
    """Batch operations on these paths are reported in `failed`, that many times."""
    page_nitems: int = 1000
    fault_plan: FaultPlan | None = None
    hold: Callable[[Request], None] | None = None
    """Called before a request is answered. It may wait, while other requests are answered."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request, in order of arrival."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def at(cls, root: Path) -> HubEmulator:
        return cls(ContentStore(root))

    def now_ms(self) -> float:
        return self.clock() * 1000

    def admit(self, method: str, path: str) -> Fault | None:
        """Record the request; what goes wrong with it, if anything."""
        with self.lock:
            number = len(self.requests)
            self.requests.append((method, path))
            return self.fault_plan(number, method, path) if self.fault_plan else None

    def hub_requests(self) -> list[tuple[str, str]]:
        """The requests that count against the Hub's rate limit: those of its API, not of the content store."""
        return [(method, path) for method, path in self.requests if path.startswith(("/api/", "/buckets/"))]

    def takes_failure(self, path: str) -> bool:
        """Whether this batch operation is to fail now."""
        with self.lock:
            if self.failing_paths[path] <= 0:
                return False
            self.failing_paths[path] -= 1
            return True

    def flip_bit(self, bucket_id: str, path: str) -> None:
        """Damage the stored content of a file: one bit in the middle of its first chunk."""
        entry = self.buckets[bucket_id].find(path)
        assert entry is not None
        xorb = self.content.xorbs_of(entry.xet_hash)[0]
        raw = bytearray(xorb.read_bytes())
        span = self.content.spans(xorb.name)[0]
        raw[(span.start + 8 + span.end) // 2] ^= 0x10
        xorb.write_bytes(raw)


def iso(ms: float) -> str:
    """As the Hub writes times."""
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
