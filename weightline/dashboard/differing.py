"""Compares the weights of two versions: by digests immediately, and element by element on request.

Counting elements replays both versions, so one count runs at a time and its result is kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from weightline.chain import Chain
from weightline.chain.replay.diff import diff_versions
from weightline.dashboard.layers import TensorChange
from weightline.errors import InputError
from weightline.format.manifest import Manifest

#: Largest size of a whole state whose elements a page counts without a request.
COUNT_UNASKED_NBYTES = 64 * 1024**2
#: Largest size of a whole state whose elements are counted on request.
MAX_COUNT_NBYTES = 16 * 1024**3
_MAX_KEPT = 256


class DifferingCounts:
    """Counts by pair of commits. Safe for threads: a second caller waits for the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], list[TensorChange]] = OrderedDict()

    def count(self, chain: Chain, a: Manifest, b: Manifest) -> list[TensorChange]:
        """Returns every tensor with its number of differing elements. InputError when the state is too large."""
        if b.full_nbytes > MAX_COUNT_NBYTES:
            raise InputError(
                f"counting would replay {b.full_nbytes / 1e9:.0f} GB twice: "
                f"run weightline diff {chain.url} {a.version} {b.version} on a machine with room",
                full_nbytes=b.full_nbytes,
            )
        pair = (a.commit_id, b.commit_id)
        with self._lock:
            if pair not in self._kept:
                # A temporary Chain, so that the headers that the replay reads are not kept in memory.
                reader = Chain(chain.store, contents=chain.contents)
                differing = diff_versions(reader, a.version, b.version)
                self._kept[pair] = [
                    TensorChange(d.name, d.num_elements, d.num_changed > 0, d.num_changed) for d in differing
                ]
                while len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            return self._kept[pair]


def compare_digests(a: Manifest, b: Manifest) -> list[TensorChange]:
    """Returns every tensor of `b`, and whether `a` has it with other bits. Uses the manifests only."""
    return [
        TensorChange(name, spec.num_elements, is_different, None if is_different else 0)
        for name, spec in b.specs.items()
        for is_different in [a.digests.get(name) != b.digests[name]]
    ]
