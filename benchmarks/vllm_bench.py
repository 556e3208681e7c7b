"""Measures the pause of a running vLLM: a refresh in place, vLLM's reload and vLLM's sparse helper, by model size.

    .venv-vllm/bin/python -m benchmarks.vllm_bench [--repeats 5] [--out FILE]     (make test-vllm makes .venv-vllm)

All measurements are of one run, on random weights of a Qwen3. At every size, first 1 % of the elements change and then
a fixed number. vLLM's reload is timed twice: of a checkpoint in the page cache, and of one that is read from the disk,
like a checkpoint that is larger than the free memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from weightline.chain import Chain, open_chain
from weightline.chain.files.checkpoint import write_checkpoint
from weightline.chain.files.source import FolderSource
from weightline.chain.replay.state import read_state
from weightline.chain.write.standalone import commit_folder
from weightline.codec.capture import capture_tensors
from weightline.codec.changes import inverse
from weightline.serving.engines.barrier import RequestBarrier
from weightline.serving.engines.vllm.driver import OfflineTransport, VllmEngine
from weightline.serving.engines.vllm.wire import read_changes_file, write_changes
from weightline.serving.engines.vllm.worker import WeightlineWorker
from weightline.serving.replica.prepare import PreparedDelta
from weightline.serving.replica.replica import Replica
from weightline.types import Changes

#: name -> (hidden size, layers); the vocabulary is that of Qwen3 cut down.
SIZES = {"35M": (384, 6), "110M": (768, 8), "270M": (1024, 16)}
_VOCAB_SIZE = 32_000
_FIXED_CHANGES = 300_000


class BenchWorker(WeightlineWorker):
    """A worker that also times vLLM's own methods, inside the worker process."""

    def bench_sparse_helper(self, path: str) -> float:
        """Returns the seconds in which vLLM's sparse helper loads a file of changes."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.checkpoint_weight_patch import (
            CheckpointWeightPatch,
            load_checkpoint_weight_patches,
        )

        patches = [_patch_of(one, CheckpointWeightPatch) for one in read_changes_file(Path(path))]
        start = time.perf_counter()
        with set_current_vllm_config(self.vllm_config):
            load_checkpoint_weight_patches(self.model_runner.get_model(), patches)
        return time.perf_counter() - start

    def bench_reload(self, folder: str) -> float:
        """Returns the seconds of vLLM's reload of a checkpoint folder."""
        self.vllm_config.load_config.load_format = "safetensors"
        start = time.perf_counter()
        self.reload_weights(weights_path=folder)
        return time.perf_counter() - start


def _patch_of(changes: Changes, patch: Callable[..., Any]) -> Any:
    spec = changes.segment.tensor
    values = torch.from_numpy(changes.new_K.view(np.int16).copy()).view(torch.bfloat16)
    return patch(spec.name, spec.shape, torch.bfloat16, values, torch.from_numpy(changes.positions_K.copy()))


@dataclass(frozen=True)
class Row:
    """The medians over the repeats, in seconds. `held` is the time in which new requests wait."""

    model: str
    num_elements: int
    num_changed: int
    pause_seconds: float
    held_seconds: float
    stage_seconds: float
    reload_seconds: float
    disk_reload_seconds: float
    helper_seconds: float


def drop_from_page_cache(folder: Path) -> None:
    """Drops the folder's files from the page cache, so that the next reader reads them from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_model(folder: Path, hidden_size: int, num_layers: int) -> None:
    """Writes a checkpoint of a Qwen3 with random bf16 weights."""
    config = Qwen3Config(
        vocab_size=_VOCAB_SIZE, hidden_size=hidden_size, intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers, num_attention_heads=hidden_size // 64, num_key_value_heads=hidden_size // 128,
        head_dim=64, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def commit_changed(chain: Chain, share: float) -> None:
    """Commits a version in which that share of every tensor's elements has its lowest bit flipped."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "next"
        tip = chain.tip_version()
        assert tip is not None
        write_checkpoint(chain, tip, folder)
        for entry in FolderSource(folder)._entries.values():
            bits_N = np.memmap(entry.path, "<u2", "r+", entry.offset, entry.spec.num_elements)
            num = max(1, round(share * bits_N.size))
            bits_N[rng.choice(bits_N.size, num, replace=False)] ^= 1
            bits_N.flush()
        commit_folder(chain, folder)


@contextmanager
def running(model_folder: Path) -> Iterator[tuple[VllmEngine, Any]]:
    """Yields an engine and its vLLM, which starts without weights."""
    from vllm import LLM

    llm = LLM(
        str(model_folder), load_format="dummy", dtype="bfloat16", enforce_eager=True, max_model_len=128,
        kv_cache_memory_bytes=2**26, worker_extension_cls="benchmarks.vllm_bench.BenchWorker",
        skip_tokenizer_init=True,
    )  # fmt: skip
    engine = VllmEngine(OfflineTransport(llm), RequestBarrier(), model_folder)
    try:
        yield engine, llm
    finally:
        engine.close()
        llm.llm_engine.engine_core.shutdown()


def measure(name: str, work: Path, shares: Sequence[float], repeats: int) -> list[Row]:
    """Measures every share of changed elements on one model and one vLLM."""
    source = work / name
    make_model(source, *SIZES[name])
    chain = open_chain((work / f"bucket-{name}").as_uri())
    num_elements = commit_folder(chain, source).num_elements
    for share in shares:
        commit_changed(chain, share if share < 1 else share / num_elements)
    rows = []
    with running(source) as (engine, llm):
        replica = Replica(chain, engine, work / f"state-{name}", "bench")
        for version in range(1, len(shares) + 1):
            rows.append(_measure_version(name, chain, replica, engine, llm, work, version, repeats))
            print(report(rows)[-1], flush=True)
    return rows


def _measure_version(
    name: str, chain: Chain, replica: Replica, engine: VllmEngine, llm: Any, work: Path, version: int, repeats: int
) -> Row:
    base, times = version - 1, defaultdict[str, list[float]](list)
    folder, changes_path = work / f"reload-{name}-{version}", work / f"changes-{name}-{version}"
    write_checkpoint(chain, base, folder)
    manifest = chain.manifest(version)
    old, new = (read_state(chain, one) for one in (base, version))
    changes = list(capture_tensors(new.specs.values(), old.bits, new.bits))
    for _ in range(repeats):
        replica.refresh(base, allow_backward=True)
        prepared = replica.prepare(version)
        assert isinstance(prepared, PreparedDelta)
        start = time.perf_counter()
        engine.stage(prepared.changes)
        times["stage"].append(time.perf_counter() - start)
        facts = replica.refresh(version)
        times["pause"].append(facts.pause_seconds)
        times["held"].append(facts.pause_seconds + facts.drain_seconds)
        # vLLM's own methods return to the base without the replica, whose next refresh starts from the base.
        write_changes(changes_path, [inverse(one) for one in changes])
        times["helper"].append(llm.collective_rpc("bench_sparse_helper", args=(str(changes_path),))[0])
        drop_from_page_cache(folder)
        for key in ("disk_reload", "reload"):  # the first puts the checkpoint into the page cache
            times[key].append(llm.collective_rpc("bench_reload", args=(str(folder),))[0])
        engine.stage(changes)  # proves that both led back to the exact bits
        engine.write_staged()
    median = {key: statistics.median(values) for key, values in times.items()}
    return Row(
        name, manifest.num_elements, manifest.num_changed, median["pause"], median["held"], median["stage"],
        median["reload"], median["disk_reload"], median["helper"],
    )  # fmt: skip


def report(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the table: milliseconds, and the ratios of vLLM's own methods to the pause."""
    lines = [
        "model  elements   changed   pause   held   stage   reload   from disk   helper   reload/pause  disk/  helper/"
    ]
    for row in rows:
        others = (row.reload_seconds, row.disk_reload_seconds, row.helper_seconds)
        milliseconds = [1e3 * one for one in (row.pause_seconds, row.held_seconds, row.stage_seconds, *others)]
        ratios = [one / row.pause_seconds for one in others]
        cells = "  ".join(f"{value:7.1f}" for value in (*milliseconds, *ratios))
        lines.append(f"{row.model:5}  {row.num_elements:9}  {row.num_changed:8}  {cells}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="weightline-bench-") as name:
        for size in args.sizes:
            rows += measure(size, Path(name), (0.01, float(_FIXED_CHANGES)), args.repeats)
    print("\n".join(report(rows)))
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
