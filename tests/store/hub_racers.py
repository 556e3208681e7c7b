"""Writers that race for the versions of one chain, each going on from the state that it finds. Light: no torch."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from tests.chains import State, commit_state, nudged, random_state
from weightline.chain.read.history import Chain
from weightline.chain.replay.state import HostState, advance_state
from weightline.chain.upkeep.verify import verify_chain
from weightline.errors import CommitConflictError
from weightline.store import open_store

NUM_WRITERS = 4
#: By each writer; the processes of one race have one environment.
NUM_COMMITS = 16 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 4
_SHAPES: dict[str, tuple[int, ...]] = {"weight": (8, 4), "scale": ()}
_SECONDS = 400


class _SeenChain(Chain):
    """A writer's view: its tip is the one that it computed its delta against."""

    seen_version: int | None = None

    def look(self) -> int | None:
        self.seen_version = super().tip_version()
        return self.seen_version

    def tip_version(self) -> int | None:
        return self.seen_version


def commit_versions(url: str, writer: int, acknowledged: Any) -> None:
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


def race(url: str) -> None:
    """NUM_WRITERS x NUM_COMMITS commits; none may be lost, none duplicated, and the chain must verify."""
    context = multiprocessing.get_context("spawn")
    acknowledged = context.Queue()
    writers = [
        context.Process(target=commit_versions, args=(url, number, acknowledged), daemon=True)
        for number in range(NUM_WRITERS)
    ]
    for writer in writers:
        writer.start()
    told = [acknowledged.get(timeout=_SECONDS) for _ in range(NUM_WRITERS * NUM_COMMITS)]
    for writer in writers:
        writer.join(_SECONDS)
    chain = Chain(open_store(url))
    manifests = chain.manifests()
    assert sorted(told) == [(manifest.version, manifest.commit_id) for manifest in manifests]
    assert [manifest.version for manifest in manifests] == list(range(NUM_WRITERS * NUM_COMMITS))
    report = verify_chain(chain)
    assert report.holds, report.findings
