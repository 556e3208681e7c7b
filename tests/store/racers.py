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
from weightline.errors import CommitConflictError

NUM_WRITERS = 4
#: By each writer; the processes of one race have one environment.
NUM_COMMITS = 16 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 4
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


def commit_versions(url: str, writer: int, acknowledged: Any) -> None:
    """One writer: commits NUM_COMMITS checkpoints, starting again from the tip whenever another one won."""
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


def race(url: str, *, in_threads: bool = False) -> None:
    """NUM_WRITERS x NUM_COMMITS commits; none may be lost, none duplicated, and the chain must verify."""
    context = multiprocessing.get_context("spawn")
    acknowledged = context.Queue()
    start: Callable[..., Any] = threading.Thread if in_threads else context.Process
    writers = [start(target=commit_versions, args=(url, writer, acknowledged)) for writer in range(NUM_WRITERS)]
    for writer in writers:
        writer.start()
    told = [acknowledged.get(timeout=_SECONDS) for _ in range(NUM_WRITERS * NUM_COMMITS)]
    for writer in writers:
        writer.join(_SECONDS)
    check_outcome(url, told)


def check_outcome(url: str, told: list[tuple[int, str]]) -> None:
    manifests = open_chain(url).manifests()
    assert sorted(told) == [(manifest.version, manifest.commit_id) for manifest in manifests]
    assert [manifest.version for manifest in manifests] == list(range(NUM_WRITERS * NUM_COMMITS))
    report = verify_chain(open_chain(url))
    assert report.holds, report.findings
