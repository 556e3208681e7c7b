"""Adaptive geometric coding: a range coder for non-negative integers whose mean drifts. SPEC.md section Codings.

The numbers of unchanged elements between changed ones follow a geometric distribution, whose only parameter is its
mean. So no table is transmitted: coder and decoder keep a running mean and derive the probabilities from it.

A value v is coded under the mean's level as a token and raw bits: v >> shift falls into a bucket (the token, by range
coding), and the remaining bits are nearly uniform. Levels are quarter octaves of the mean.

Legend: K values, R runs (each with its own initial mean), L levels, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.varint import NumberReader, put_numbers
from weightline.errors import PayloadError

Numbers = npt.NDArray[np.unsignedinteger[Any]]
Counts = npt.NDArray[np.int64]

#: Fraction bits of the running mean.
FRACTION_BITS = 16
#: The mean moves by 1 / 2**RATE_BITS of the distance to each value.
RATE_BITS = 6
#: Values enter the mean as at most CLIP * (mean + 1), so that an outlier does not distort the next hundred values.
CLIP = 8
#: Values also enter the mean as at most this.
MAX_MEAN = 1 << 40
#: Probabilities are multiples of 2**-PROBABILITY_BITS.
PROBABILITY_BITS = 16
_TOTAL = 1 << PROBABILITY_BITS

_LOWEST_OCTAVE = -11
_NUM_LEVELS = 4 * 51
_FIRST_SHIFTED_OCTAVE = 3
_NUM_PLAIN_ROWS = 4 * (_FIRST_SHIFTED_OCTAVE - _LOWEST_OCTAVE)

#: Buckets: 0 .. 15 one by one, two an octave up to 64, one an octave above.
BUCKET_STARTS = (*range(16), 16, 24, 32, 48, *(1 << octave for octave in range(6, 63)))
BUCKET_BITS = (*(0,) * 16, 3, 3, 4, 4, *range(6, 63))
NUM_TOKENS = len(BUCKET_STARTS)
_NUM_TABLED = 65


@dataclass(frozen=True, slots=True)
class Tables:
    """Constants of the format, as arrays for the kernels.

    bounds_L: level i holds the means from bounds[i] on (FRACTION_BITS of fraction); a last entry bounds the last level.
    shifts_L, rows_L: by level, the number of raw low bits, and the row of probabilities.
    cumulative: row x (token + 1), in units of 2**-PROBABILITY_BITS.
    """

    bounds_L: npt.NDArray[np.int64]
    shifts_L: Numbers
    rows_L: Numbers
    cumulative: Numbers
    starts_T: Numbers
    bits_T: Numbers
    #: Not part of the format: row x (probability >> 8), the first possible token, where the decoder's search starts.
    guesses: Numbers
    #: Not part of the format: row x scaled value, width << 40 | raw bits << 32 | start of its token. The coder's lookup
    #: table for small values.
    small: Numbers


@cache
def tables() -> Tables:
    """Returns the constants. They are computed by IEEE operations only, so they are the same on every host."""
    levels = [divmod(level, 4) for level in range(_NUM_LEVELS)]
    octaves = [octave + _LOWEST_OCTAVE for octave, _ in levels]
    bounds = [
        (4 + quarter) << (octave + FRACTION_BITS - 2) for octave, (_, quarter) in zip(octaves, levels, strict=True)
    ]
    plain_rows = [
        _row((4.5 + quarter) / 4.0 * 2.0**octave) for octave, (_, quarter) in zip(octaves, levels, strict=True)
    ]
    shifted_rows = [_row(4.0 + quarter) for quarter in range(4)]
    cumulative = np.array(plain_rows[:_NUM_PLAIN_ROWS] + shifted_rows, np.uint64)
    return Tables(
        np.array([0, *bounds[1:], 1 << 62], np.int64),
        np.array([max(octave - _FIRST_SHIFTED_OCTAVE + 1, 0) for octave in octaves], np.uint64),
        np.array([n if n < _NUM_PLAIN_ROWS else _NUM_PLAIN_ROWS + n % 4 for n in range(_NUM_LEVELS)], np.uint64),
        cumulative,
        np.array(BUCKET_STARTS, np.uint64),
        np.array(BUCKET_BITS, np.uint64),
        np.array([np.searchsorted(row, np.arange(0, _TOTAL, 256), side="right") - 1 for row in cumulative], np.uint64),
        _small(cumulative),
    )


def _small(cumulative: Numbers) -> Numbers:
    tokens = np.searchsorted(np.array(BUCKET_STARTS), np.arange(_NUM_TABLED), side="right") - 1
    start, width = cumulative[:, tokens], np.diff(cumulative, axis=1)[:, tokens]
    bits = np.array(BUCKET_BITS, np.uint64)[tokens]
    packed: Numbers = width << np.uint64(40) | bits << np.uint64(32) | start
    return np.ascontiguousarray(packed)


def _row(mean: float) -> list[int]:
    """Returns the cumulative widths of the tokens for a geometric distribution of this mean. No width is zero."""
    ratio = mean / (1.0 + mean)
    tails = [1.0]
    for _ in range(16):
        tails.append(tails[-1] * ratio)
    tails += [tails[16] * tails[8], tails[16] * tails[16]]
    tails += [tails[18] * tails[16], tails[18] * tails[18]]
    while len(tails) < NUM_TOKENS:
        tails.append(tails[-1] * tails[-1])
    tails.append(0.0)
    widths = [1 + int((_TOTAL - NUM_TOKENS) * (tails[t] - tails[t + 1])) for t in range(NUM_TOKENS)]
    widths[0] += _TOTAL - sum(widths)
    return [sum(widths[:t]) for t in range(NUM_TOKENS + 1)]


def level_of(mean: float) -> int:
    """Returns the level that holds a mean. A writer may start a run from any level."""
    bounds_L = tables().bounds_L
    scaled = min(int(mean * (1 << FRACTION_BITS)), MAX_MEAN << FRACTION_BITS)
    return int(np.searchsorted(bounds_L[:-1], scaled, side="right")) - 1


def start_levels(values_K: Numbers, counts_R: Counts) -> Counts:
    """Returns a level to start each run from: that of the mean of its first values, with outliers clipped."""
    return np.searchsorted(tables().bounds_L[:-1], _start_means(values_K, counts_R), side="right") - 1


def start_mean(values_K: Numbers) -> float:
    """Returns the mean from which `start_levels` chooses the level, for a single run."""
    return int(_start_means(values_K, np.array([values_K.size]))[0]) / (1 << FRACTION_BITS)


def _start_means(values_K: Numbers, counts_R: Counts) -> Counts:
    from weightline.codec.kernels import geometric as kernel

    means_R = np.zeros(counts_R.size, np.int64)
    kernel.start_means(values_K, counts_R, means_R)
    return means_R


def encode_runs(values_K: Numbers, counts_R: Counts, levels_R: Counts, head: bytes | bytearray = b"") -> bytes:
    """Codes `values_K` (each below 2**63) in runs of `counts_R` values that start at the means of `levels_R`.

    After `head`, the stream is the number of token words, these words, then the words of the raw bits; 32-bit,
    little-endian.
    """
    from weightline.codec.kernels import geometric as kernel

    t = tables()
    words, raws = np.empty(values_K.size + 3, np.uint32), np.empty(2 * values_K.size + 2, np.uint32)
    num_words, num_raws = kernel.encode_runs(
        values_K, counts_R, t.bounds_L[levels_R],
        t.bounds_L, t.shifts_L, t.rows_L, t.cumulative, t.small, t.starts_T, t.bits_T, words, raws,
    )  # fmt: skip
    count = bytearray()
    put_numbers(count, int(num_words))
    written = words[:num_words], raws[:num_raws]
    return b"".join([head, count, *(array.astype("<u4", copy=False).data for array in written)])


def decode_runs(stream: bytes, counts_R: Counts, levels_R: Counts) -> npt.NDArray[np.uint64]:
    """Returns the values of a stream. The counts bound the memory.

    PayloadError unless every word is used and none is missing.
    """
    from weightline.codec.kernels import geometric as kernel

    if (levels_R < 0).any() or (levels_R >= _NUM_LEVELS).any():
        raise PayloadError("a run starts from an unknown level", rule="stream-level")
    reader = NumberReader(stream, "stream-length")
    words = np.frombuffer(reader.take(4 * reader.number()), "<u4").astype(np.uint32)
    raws = np.frombuffer(reader.rest_of_words(), "<u4").astype(np.uint32)
    values_K = np.empty(int(counts_R.sum()), np.uint64)
    t = tables()
    used = kernel.decode_runs(
        words, raws, counts_R, t.bounds_L[levels_R],
        t.bounds_L, t.shifts_L, t.rows_L, t.cumulative, t.guesses, t.starts_T, t.bits_T, values_K,
    )  # fmt: skip
    if tuple(map(int, used)) != (words.size, raws.size):
        raise PayloadError(f"a stream of {words.size} + {raws.size} words decodes from {used}", rule="stream-length")
    if values_K.size and int(values_K.max()) >> 63:
        raise PayloadError("a value has more than 63 bits", rule="value-range")
    return values_K
