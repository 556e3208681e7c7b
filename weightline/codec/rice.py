"""Adaptive Rice coding: non-negative integers below 2**32 whose mean drifts, for speed. SPEC.md section Rice streams.

A value v is written as v >> k in unary and its k low bits. k follows the running mean of geometric coding, so no
parameter is transmitted. For geometrically distributed values with a mean of 8 or more this takes one or two percent
more bytes than range coding, and half the time, since only the mean depends on the value before.

Legend: K values.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.varint import NumberReader
from weightline.errors import PayloadError

Numbers = npt.NDArray[np.unsignedinteger[Any]]

#: Parameters k that a stream can hold.
NUM_PARAMETERS = 32
#: k serves the means below BOUND << k (16 fraction bits) less one half; from there on, k + 1 takes fewer bits.
BOUND = 136192
#: A quotient this large or larger is written as this many zeros, and the value as 32 bits.
ESCAPE = 24
#: Below this mean, range coding is used, since it saves enough bytes for its time.
LEAST_MEAN = 8.0
_HALF = 1 << 15


def bounds() -> list[int]:
    """Returns, by parameter, the mean (16 fraction bits) at which its range ends."""
    return [(BOUND << k) - _HALF for k in range(NUM_PARAMETERS - 1)] + [1 << 62]


def mean_of_parameter(parameter: int) -> int:
    """Returns the mean (16 fraction bits) at which a stream starts: the middle of the parameter's range."""
    return 3 << (15 + parameter)


def parameter_of(mean: float) -> int:
    """Returns the parameter for a mean. A writer may start a stream from any parameter."""
    return bisect_right(bounds(), int(mean * (1 << 16)))


def encode_rice(values_K: Numbers, parameter: int, head: bytes | bytearray = b"") -> bytes:
    """Returns `head` and the 64-bit words, little-endian, of `values_K` (each below 2**32), from `parameter` on."""
    from weightline.codec.kernels import rice as kernel

    words = np.empty(values_K.size + 2, np.uint64)
    num_words = kernel.encode(
        np.ascontiguousarray(values_K, np.uint32), mean_of_parameter(parameter), _bounds_array(), words
    )
    return b"".join([head, words[:num_words].astype("<u8", copy=False).data])


def decode_rice(stream: bytes, num_values: int, parameter: int) -> npt.NDArray[np.uint32]:
    """Returns the values of a stream. PayloadError unless every word is used and none is missing."""
    from weightline.codec.kernels import rice as kernel

    if not 0 <= parameter < NUM_PARAMETERS:
        raise PayloadError(f"a stream starts from the unknown parameter {parameter}", rule="stream-level")
    num_words = len(NumberReader(stream, "stream-length").rest_of_words(8)) // 8
    words = np.zeros(num_words + 2, np.uint64)
    words[:num_words] = np.frombuffer(stream, "<u8")
    values_K = np.empty(num_values, np.uint32)
    used = int(kernel.decode(words, mean_of_parameter(parameter), _bounds_array(), values_K))
    if used != num_words:
        raise PayloadError(f"a stream of {num_words} words does not hold {num_values} values", rule="stream-length")
    return values_K


@cache
def _bounds_array() -> npt.NDArray[np.int64]:
    return np.array(bounds(), np.int64)
