"""Reads two consecutive states to measure on. Without files, it uses the real rows of the test suite."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from weightline.chain.files.source import FolderSource
from weightline.types import BitsArray, TensorSpec

_DATA = Path(__file__).parent.parent / "tests" / "codec" / "data" / "states.npz"


def parse_states(parser: argparse.ArgumentParser) -> tuple[TensorSpec, BitsArray, BitsArray]:
    """Adds the common arguments, parses, and returns (tensor, old bits, new bits) of `--mib` mebibytes each."""
    parser.add_argument("old", type=Path, nargs="?", help="state A, a .safetensors file or a folder")
    parser.add_argument("new", type=Path, nargs="?", help="state B of the same model")
    parser.add_argument("--dtype", default="BF16", help="elements of this dtype are measured")
    parser.add_argument("--mib", type=int, default=256, help="fill this many mebibytes a state")
    parser.add_argument("--run", default="grpo-3e-6", help="of the built-in states: sft-3e-6 or grpo-3e-6")
    args = parser.parse_args()
    if args.old and not args.new:
        parser.error("give two states, or none")
    states = [flat_bits(path, args.dtype) for path in (args.old, args.new)] if args.old else built_in(args.run)
    size = (args.mib << 20) // states[0].itemsize
    old_N, new_N = (np.resize(bits_N, size) for bits_N in states)
    return TensorSpec("all", args.dtype if args.old else "BF16", (size,)), old_N, new_N


def flat_bits(state: Path, dtype: str) -> BitsArray:
    """Returns all elements of one dtype, laid end to end."""
    target = FolderSource(state)
    found = target.read(name for name, spec in target.specs.items() if spec.dtype == dtype)
    return np.concatenate(list(found.values()))


def built_in(run: str) -> list[BitsArray]:
    """Returns the old and the new bits of a run's rows."""
    with np.load(_DATA) as arrays:
        keys = sorted({key.rpartition("|")[0] for key in arrays if key.startswith(f"{run}|")})
        old = {key: arrays[f"{key}|old"] for key in keys}
        new = {key: bits.copy() for key, bits in old.items()}
        for key in keys:
            new[key][arrays[f"{key}|index"]] = arrays[f"{key}|bits"]
    return [np.concatenate(list(state.values())) for state in (old, new)]
