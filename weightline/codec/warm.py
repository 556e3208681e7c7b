"""Compiles the codec's kernels ahead of their first use: `python -m weightline.codec.warm`, or with `--all`.

numba compiles a kernel for each width of elements when it is first called, and keeps the machine code on disk. That
takes up to a minute of CPU in all, which the installation of a checkout spends here, once, instead of every process
that happens to be first. Without it everything works the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from weightline.codec.capture import capture
from weightline.codec.coding import ChunkBase, codings
from weightline.codec.digest import digest_change, tensor_digest
from weightline.dtypes import DTYPES, bits_dtype
from weightline.types import BitsArray, TensorSpec, whole

#: The dtypes that models are trained and served in.
_USUAL = ("BF16", "F32")
_NUM_ELEMENTS = 20_000
#: Shares of changed elements: sparse gaps take a Rice stream, dense ones an adaptive stream.
_DENSITIES = (0.01, 0.5)


def warm(dtypes: Sequence[str]) -> None:
    """Captures, encodes, decodes and applies small changes in these dtypes. Safe to repeat; then it takes a second."""
    for dtype in dtypes:
        for density in _DENSITIES:
            for is_writable in (True, False):
                _round_trip(dtype, density, is_writable)


def _round_trip(dtype: str, density: float, is_writable: bool) -> None:
    """Calls every kernel that capture, both codings, digests and writes in place use.

    States may be read-only, as mapped files are, and numba compiles a kernel for these separately.
    """
    from weightline.codec.kernels import elements

    spec = TensorSpec("warm", dtype, (_NUM_ELEMENTS,))
    rng = np.random.default_rng(0)
    old_N = _bits(rng, dtype)
    new_N = np.where(rng.random(_NUM_ELEMENTS) < density, old_N ^ old_N.dtype.type(1), old_N)
    for bits_N in (old_N, new_N):
        bits_N.setflags(write=is_writable)
    tensor_digest(whole(spec), old_N)
    for coding in codings().values():
        changes = capture(whole(spec), old_N, new_N, ranked=coding.ranked)
        digest_change(changes)
        streams = coding.encode([changes])
        base = ChunkBase([True], lambda _: old_N)
        for decoded in coding.decode(streams, [whole(spec)], changes.num_changed, base):
            signed_N, signed_K = (bits.copy().view(DTYPES[dtype].signed) for bits in (old_N, decoded.new_K))
            elements.write_and_count_differing(signed_N, decoded.positions_K, signed_K)
            elements.count_differing(signed_N, decoded.positions_K, signed_K)


def _bits(rng: np.random.Generator, dtype: str) -> BitsArray:
    """Returns bits of all classes of the dtype."""
    width = bits_dtype(dtype)
    return rng.integers(0, np.iinfo(width).max, _NUM_ELEMENTS, width, endpoint=True)


if __name__ == "__main__":
    warm(tuple(DTYPES) if "--all" in sys.argv[1:] else _USUAL)
