"""Measures how capture and encoding scale with threads. It uses wall time, so the machine must be idle.

python -m benchmarks.threads_bench [A.safetensors B.safetensors] [--mib 256]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.states import parse_states
from weightline.bench.timing import best_of
from weightline.codec.capture import capture
from weightline.codec.coding import codings
from weightline.format.write_payload import write_delta
from weightline.types import BitsArray, Changes, Segment, TensorSpec

_NUM_TENSORS = 8
_REPEATS = 5

Part = tuple[Segment, BitsArray, BitsArray]


def capture_all(parts: list[Part], is_ranked: bool, num_threads: int) -> list[Changes]:
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda part: capture(*part, ranked=is_ranked), parts))


def measure(coding: str, is_ranked: bool, parts: list[Part], path: Path) -> str:
    """Returns a line with the speedups of two threads over one."""
    one, changes = best_of(_REPEATS, partial(capture_all, parts, is_ranked, 1))
    two, _ = best_of(_REPEATS, partial(capture_all, parts, is_ranked, 2))
    encode_one, _ = best_of(_REPEATS, partial(write_delta, path, changes, coding))
    encode_two, _ = best_of(_REPEATS, partial(write_delta, path, changes, coding, num_threads=2))
    return f"{coding:17} two threads: capture {one / two:.2f} x, encode {encode_one / encode_two:.2f} x of one"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tensor, old_N, new_N = parse_states(parser)
    states = zip(np.array_split(old_N, _NUM_TENSORS), np.array_split(new_N, _NUM_TENSORS), strict=True)
    parts = [
        (Segment(TensorSpec(str(n), tensor.dtype, old.shape), 0, old.size), old, new)
        for n, (old, new) in enumerate(states)
    ]
    print(f"threads           load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        for name, coding in codings().items():
            print(measure(name, coding.ranked, parts, Path(folder) / "payload.safetensors"), flush=True)


if __name__ == "__main__":
    main()
