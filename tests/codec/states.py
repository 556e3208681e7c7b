"""States for tests: real ones, cut down, and Hypothesis strategies for any others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import hypothesis.strategies as st
import numpy as np

from weightline import dtypes
from weightline.dtypes import bits_dtype
from weightline.types import BitsArray, Segment, TensorSpec

#: Two consecutive bf16 states (optimizer steps 2 and 3) of a few rows of a trained 40M-parameter Qwen3, AdamW.
DATA = Path(__file__).parent / "data" / "states.npz"
RUNS = ("sft-3e-6", "grpo-3e-6")
DTYPES = tuple(sorted(dtypes.DTYPES))

Pair = tuple[Segment, BitsArray, BitsArray]


def real_pairs(run: str) -> list[Pair]:
    """(segment, old bits, new bits) of every tensor of a run."""
    with np.load(DATA) as arrays:
        keys = sorted({key.rpartition("|")[0] for key in arrays if key.startswith(run + "|")})
        return [_real_pair(arrays, key) for key in keys]


def _real_pair(arrays: Mapping[str, BitsArray], key: str) -> Pair:
    _, name, shape = key.split("|")
    old_N = arrays[key + "|old"]
    new_N = old_N.copy()
    new_N[arrays[key + "|index"]] = arrays[key + "|bits"]
    tensor = TensorSpec(name, "BF16", tuple(int(size) for size in shape.split("x")))
    return Segment(tensor, 0, tensor.num_elements), old_N, new_N


def whole(name: str, dtype: str, num_elements: int) -> Segment:
    """A flat tensor as one segment."""
    return Segment(TensorSpec(name, dtype, (num_elements,)), 0, num_elements)


def random_bits(rng: np.random.Generator, dtype: str, num_elements: int) -> BitsArray:
    """Any bit pattern: NaN payloads, infinities, subnormals and both zeros among them."""
    raw = rng.integers(0, 256, num_elements * bits_dtype(dtype).itemsize, dtype=np.uint8)
    return raw.view(bits_dtype(dtype))


def changed(rng: np.random.Generator, old_N: BitsArray, density: float) -> BitsArray:
    """Some elements replaced by any bits, some moved by a small step."""
    new_N = old_N.copy()
    hit_N = rng.random(old_N.size) < density
    new_N[hit_N] += rng.integers(0, 3, old_N.size).astype(old_N.dtype)[hit_N]
    wild_N = rng.random(old_N.size) < density / 4
    new_N[wild_N] = rng.integers(0, 256, old_N.size * old_N.itemsize, dtype=np.uint8).view(old_N.dtype)[wild_N]
    return new_N


@st.composite
def pairs(draw: st.DrawFn, max_elements: int = 300, dtypes: tuple[str, ...] = DTYPES) -> Pair:
    """A segment of a tensor that may be larger, with any two states of it."""
    dtype = draw(st.sampled_from(dtypes))
    length = draw(st.integers(0, max_elements))
    start, after = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
    old_N = random_bits(rng, dtype, length)
    new_N = changed(rng, old_N, draw(st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0])))
    return Segment(TensorSpec(name, dtype, (start + length + after,)), start, length), old_N, new_N
