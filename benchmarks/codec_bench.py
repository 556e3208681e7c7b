"""Speed of the codings on buffers far larger than the caches: two states of a model, repeated until they fill them.

    python benchmarks/codec_bench.py A.safetensors B.safetensors --mib 256

Ratios to memcmp of the same buffers in the same run are what carries over to other machines. Single thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from weightline.bench.codings import bench_codings
from weightline.chain.target import FileTarget
from weightline.types import BitsArray, TensorSpec


def flat_bits(state: Path, dtype: str) -> BitsArray:
    """All elements of one dtype, laid end to end."""
    target = FileTarget(state)
    found = target.read(name for name, spec in target.specs.items() if spec.dtype == dtype)
    return np.concatenate(list(found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--dtype", default="BF16")
    parser.add_argument("--mib", type=int, default=256)
    args = parser.parse_args()
    old_N, new_N = flat_bits(args.old, args.dtype), flat_bits(args.new, args.dtype)
    size = (args.mib << 20) // old_N.itemsize
    tensor = TensorSpec("all", args.dtype, (size,))
    for r in bench_codings([(tensor, np.resize(old_N, size), np.resize(new_N, size))], repeats=5):
        nanoseconds = 1e9 * r.encode_seconds / max(r.num_changed, 1)
        print(
            f"{r.coding:17} {100 * r.num_changed / r.num_elements:.2f} % changed  {r.bytes_per_changed:.4f} B/changed  "
            f"capture {r.memcmp_seconds / r.capture_seconds:.3f} x memcmp  "
            f"encode {r.encode_seconds / r.capture_seconds:.2f} x capture ({nanoseconds:.0f} ns/changed)  "
            f"decode {r.decode_seconds:.3f} s  apply {r.apply_seconds:.3f} s  exact {r.exact}"
        )


if __name__ == "__main__":
    main()
