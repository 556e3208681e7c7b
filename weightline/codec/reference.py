"""A readable reference of every compiled loop, in plain numpy or Python, against which the tests check the kernels.

It is slow, and meant for tests and readers of SPEC.md only.

Legend: N elements, K changed elements, R runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.digest import tensor_seeds
from weightline.codec.geometric import CLIP, FRACTION_BITS, MAX_MEAN, PROBABILITY_BITS, RATE_BITS, tables
from weightline.codec.pieces import TILE, RankedChanges, classes_of
from weightline.codec.rice import ESCAPE, bounds, mean_of_parameter
from weightline.codec.varint import put_numbers
from weightline.types import BitsArray, Segment

_MASK = (1 << 64) - 1
Array = npt.NDArray[Any]


def capture(segment: Segment, old_N: BitsArray, new_N: BitsArray) -> RankedChanges:
    """Returns the result of `weightline.codec.capture.capture(..., ranked=True)`."""
    positions_K = np.flatnonzero(old_N != new_N)
    classes_N = classes_of(old_N, segment.tensor.dtype)
    ranks = [np.zeros(0, np.int64)]
    for start in range(0, segment.length, TILE):
        tile_N = classes_N[start : start + TILE]
        within = positions_K[(positions_K >= start) & (positions_K < start + TILE)] - start
        ranks.append(np.array([np.count_nonzero(tile_N[:at] == tile_N[at]) for at in within], np.int64))
    ranks_K = np.concatenate(ranks).astype(np.uint32)
    return RankedChanges(segment, positions_K, old_N[positions_K], new_N[positions_K], ranks_K)


def mix_sum(segment: Segment, positions_K: Array, bits_K: BitsArray) -> int:
    """Returns the part of a tensor's digest that comes from some elements of a segment."""
    seed_0, seed_1 = tensor_seeds(segment.tensor)
    index_K = (positions_K + segment.start).astype(np.uint64)
    x = np.uint64(seed_0) + index_K * np.uint64(0x9E3779B97F4A7C15) + bits_K.astype(np.uint64)
    y = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    y ^= y >> np.uint64(29)
    z = (y ^ np.uint64(seed_1)) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(32)
    return int(z.sum(dtype=np.uint64)) << 64 | int(y.sum(dtype=np.uint64))


def encode_runs(values: list[int], counts: list[int], levels: list[int]) -> bytes:
    """Returns the result of `weightline.codec.geometric.encode_runs`, by exact integers without words and carries."""
    t = tables()
    low, span, num_words, raws, num_raw_bits, k = 0, _MASK, 0, 0, 0, 0
    for count, start_level in zip(counts, levels, strict=True):
        mean = int(t.bounds_L[start_level])
        for _ in range(count):
            start, width, raw, num_bits = _place(values[k], mean)
            part = span >> PROBABILITY_BITS
            low, span = low + part * start, part * width
            if span < 1 << 32:
                low, span, num_words = low << 32, span << 32, num_words + 1
            raws |= raw << num_raw_bits
            num_raw_bits += num_bits
            mean = next_mean(mean, values[k])
            k += 1
    words = (low + (1 << 32) - 1) >> 32
    out = bytearray()
    put_numbers(out, num_words + 1)
    for n in range(num_words, -1, -1):
        out += (words >> 32 * n & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(out) + raws.to_bytes(-(-num_raw_bits // 32) * 4, "little")


def next_mean(mean: int, value: int) -> int:
    """Returns the running mean after a value. FRACTION_BITS of it are the fraction."""
    seen = min(value, CLIP * (mean >> FRACTION_BITS) + CLIP, MAX_MEAN)
    return mean + (((seen << FRACTION_BITS) - mean) >> RATE_BITS)


def encode_rice(values: list[int], parameter: int) -> bytes:
    """Returns the result of `weightline.codec.rice.encode_rice`, by one long integer instead of words."""
    mean, bits, num_bits = mean_of_parameter(parameter), 0, 0
    for value in values:
        k = next(k for k, bound in enumerate(bounds()) if mean < bound)
        is_escaped = value >> k >= ESCAPE
        quotient, low_bits = (ESCAPE, 32) if is_escaped else (value >> k, k)
        bits |= (1 << quotient | (value & ((1 << low_bits) - 1)) << (quotient + 1)) << num_bits
        num_bits += quotient + 1 + low_bits
        mean = next_mean(mean, value)
    return bits.to_bytes(-(-num_bits // 64) * 8, "little")


def _place(value: int, mean: int) -> tuple[int, int, int, int]:
    """Returns the start and width of the value's token under the level of the mean, its raw bits and their number."""
    t = tables()
    level = int(np.searchsorted(t.bounds_L, mean, side="right")) - 1
    shift, row = int(t.shifts_L[level]), [int(start) for start in t.cumulative[t.rows_L[level]]]
    token = int(np.searchsorted(t.starts_T, np.uint64(value >> shift), side="right")) - 1
    raw = value - (int(t.starts_T[token]) << shift)
    return row[token], row[token + 1] - row[token], raw, int(t.bits_T[token]) + shift
