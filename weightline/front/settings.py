"""The settings of a front."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightline.chain import Chain, open_chain


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The settings of a front's server. `port` 0 takes a free port; `address.json` in the state folder names it."""

    chain_url: str
    state_dir: Path
    name: str = "front"
    host: str = "127.0.0.1"
    port: int = 8080
    replica_urls: tuple[str, ...] = ()
    """Replicas besides those whose leases name a trusted host."""
    retry_seconds: float = 30.0
    """Time for which a request that no replica answers is tried again."""
    answer_seconds: float = 600.0
    """Longest time between two bytes of a replica's answer."""

    def open_chain(self) -> Chain:
        """Opens the chain, whose leases are read."""
        return open_chain(self.chain_url)
