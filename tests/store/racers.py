"""Writers that race for the versions of one chain, through weightline.chain alone, and what must hold afterwards."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from weightline.chain import open_chain
from weightline.chain.upkeep.verify import verify_chain
from weightline.chain.write.standalone import commit_folder
from weightline.codec.digest import tensor_digest
from weightline.errors import CommitConflictError
from weightline.types import Segment, TensorSpec

#: Commits the versions of one writer to the chain, and puts (version, commit id) of each into the queue.
CommitVersions = Callable[[str, int, Any], None]
#: Writers of a race, and commits by each; the processes of one race have one environment.
NUM_WRITERS, NUM_COMMITS = (4, 16) if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else (3, 3)
_SECONDS = 300


def write_checkpoint_folder(folder: Path, seed: int) -> Path:
    """A tiny checkpoint, other bits for every seed."""
    random = np.random.default_rng(seed)
    shapes = {"embed.weight": [32, 8], "norm.weight": [8]}
    tensors = {name: random.integers(0, 2**16, shape, np.uint16) for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoint folders hold the same bits."""
    ours, theirs = (dict(safetensors.deserialize((f / "model.safetensors").read_bytes())) for f in (one, other))
    return ours == theirs


def commit_folders(url: str, writer: int, acknowledged: Any) -> None:
    """One writer: commits checkpoint folders, starting again from the tip whenever another one won."""
    chain = open_chain(url)
    with tempfile.TemporaryDirectory() as name:
        for number in range(NUM_COMMITS):
            folder = write_checkpoint_folder(Path(name) / str(number), 1000 * writer + number)
            while True:
                try:
                    manifest = commit_folder(chain, folder, coding="gap")
                except CommitConflictError:
                    continue
                acknowledged.put((manifest.version, manifest.commit_id))
                break


def race(url: str, commit_versions: CommitVersions = commit_folders) -> None:
    """NUM_WRITERS x NUM_COMMITS commits by processes; none may be lost, none duplicated, and the chain must verify."""
    context = multiprocessing.get_context("spawn")
    acknowledged = context.Queue()
    writers = context.Process(target=_fork_writers, args=(url, commit_versions, acknowledged))
    writers.start()
    writers.join(_SECONDS)
    assert writers.exitcode == 0
    _check_race(url, acknowledged)


def race_in_threads(url: str, commit_versions: CommitVersions = commit_folders) -> None:
    """The same race by threads of this process."""
    acknowledged = multiprocessing.get_context("spawn").Queue()
    writers = [threading.Thread(target=commit_versions, args=(url, n, acknowledged)) for n in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(_SECONDS)
    _check_race(url, acknowledged)


def _fork_writers(url: str, commit_versions: CommitVersions, acknowledged: Any) -> None:
    """In a new process, which loads Numba's kernels before it forks: that takes longer than a race."""
    tensor_digest(Segment(TensorSpec("x", "BF16", (1,)), 0, 1), np.zeros(1, np.uint16))
    assert threading.active_count() == 1, "a fork would lack the other threads"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=commit_versions, args=(url, n, acknowledged)) for n in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * NUM_WRITERS


def _check_race(url: str, acknowledged: Any) -> None:
    commits = [acknowledged.get(timeout=10) for _ in range(NUM_WRITERS * NUM_COMMITS)]
    manifests = open_chain(url).manifests()
    assert sorted(commits) == [(manifest.version, manifest.commit_id) for manifest in manifests]
    assert [manifest.version for manifest in manifests] == list(range(NUM_WRITERS * NUM_COMMITS))
    report = verify_chain(open_chain(url))
    assert report.holds, report.findings
