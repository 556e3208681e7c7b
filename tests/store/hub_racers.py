"""A writer of tests/store/racers.py that goes on from the state that it finds, as a trainer does."""

from __future__ import annotations

from typing import Any

from tests.chains import State, commit_state, nudged, random_state
from tests.store.racers import NUM_COMMITS
from weightline.chain.read.history import Chain
from weightline.chain.replay.state import HostState, advance_state
from weightline.errors import CommitConflictError
from weightline.store import open_store

_SHAPES: dict[str, tuple[int, ...]] = {"weight": (8, 4), "scale": ()}


class _SeenChain(Chain):
    """A writer's view: its tip is the one that it computed its delta against."""

    seen_version: int | None = None

    def look(self) -> int | None:
        self.seen_version = super().tip_version()
        return self.seen_version

    def tip_version(self) -> int | None:
        return self.seen_version


def commit_states(url: str, writer: int, acknowledged: Any) -> None:
    """NUM_COMMITS commits, starting again from the tip whenever another one won."""
    chain, state = _SeenChain(open_store(url)), HostState()
    for number in range(NUM_COMMITS):
        while True:
            tip = chain.look()
            old = _state_at(chain, state, tip) if tip is not None else None
            seed = 1000 * writer + number
            new = random_state(seed, _SHAPES) if old is None else nudged(old, seed, density=0.5)
            try:
                manifest = commit_state(chain, new, old, world_size=1)
            except CommitConflictError:
                continue
            acknowledged.put((manifest.version, manifest.commit_id))
            break


def _state_at(chain: Chain, state: HostState, version: int) -> State:
    advance_state(chain, state, version)
    return {name: state.bits[name].reshape(spec.shape).copy() for name, spec in state.specs.items()}  # type: ignore[misc]
