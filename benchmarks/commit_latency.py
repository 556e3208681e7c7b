"""Measures the time from encoded payloads to a visible version, on any store."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import numpy as np

from tests.chains import make_manifest
from weightline.chain.read.history import Chain
from weightline.chain.write.commit import commit_manifest, new_commit_id
from weightline.format import keys
from weightline.format.manifest import PayloadRef
from weightline.store import Store

_PAYLOAD_NBYTES = 4 * 2**20
_NUM_RANKS = 2
#: Describes the uploaded payloads in a line of a report.
PAYLOADS = f"{_NUM_RANKS} payloads of {_PAYLOAD_NBYTES // 2**20} MiB one after the other"


def commit_latency(store: Store, folder: Path, repeats: int) -> float:
    """Returns the median seconds from encoded payloads on disk until a new reader sees the version.

    Every version has new bytes, because a store that deduplicates would not upload the same bytes again.
    """
    payload = folder / "payload"
    state = {"weight": np.zeros((64, 64), np.uint16)}
    seconds = []
    for version in range(repeats):
        payload.write_bytes(os.urandom(_PAYLOAD_NBYTES))
        commit_id = new_commit_id()
        refs = tuple(
            PayloadRef(key=keys.payload(version, commit_id, rank), nbytes=_PAYLOAD_NBYTES, sha256="0" * 64, rank=rank)
            for rank in range(_NUM_RANKS)
        )
        manifest = make_manifest(state, version, commit_id, refs, is_anchor=version == 0)
        start = time.perf_counter()
        for ref in refs:
            store.put_file(ref.key, payload)
        commit_manifest(Chain(store), manifest)
        assert Chain(store).tip_version() == version
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
