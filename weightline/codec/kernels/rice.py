"""The loops of adaptive Rice coding. What they compute is stated in weightline/codec/rice.py and SPEC.md.

Bits fill 64-bit words from the lowest up. No branch but the change of the parameter depends on a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit
from weightline.codec.kernels.geometric import next_mean

Array = npt.NDArray[Any]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_LAST_BIT = np.uint64(63)
_LOG_WORD = np.uint64(6)
_ESCAPE = np.uint64(24)
_UNARY_MASK = np.uint64((1 << 25) - 1)
_ESCAPED_BITS = np.uint64(32)
_LOW_32 = np.uint64((1 << 32) - 1)


@jit
def _parameter(k: Any, mean: Any, bounds: Array) -> Any:
    """The parameter that serves the mean, found from the last one."""
    while mean >= bounds[k]:
        k += 1
    while k > 0 and mean < bounds[k - 1]:
        k -= 1
    return k


@jit
def encode(values_K: Array, mean: int, bounds: Array, words: Array) -> int:
    """Write the values' bits; return how many words they take."""
    held, fill, at = _ZERO, _ZERO, _ZERO
    k = _parameter(0, mean, bounds)
    for i in range(np.uint64(values_K.size)):
        value = np.uint64(values_K[i])
        k = _parameter(k, mean, bounds)
        low_bits = np.uint64(k)
        quotient = value >> low_bits
        if quotient >= _ESCAPE:
            quotient, low_bits = _ESCAPE, _ESCAPED_BITS
        low = value & ((_ONE << low_bits) - _ONE)
        code, num_bits = (low << _ONE | _ONE) << quotient, quotient + _ONE + low_bits
        words[at] = held | code << fill
        spilled = (code >> _ONE) >> (_LAST_BIT - fill)
        fill += num_bits
        is_full = fill >> _LOG_WORD
        held = spilled if is_full else words[at]
        at += is_full
        fill &= _LAST_BIT
        mean = next_mean(mean, value)
    words[at] = held
    return int(at + np.uint64(fill > _ZERO))


@jit
def decode(words: Array, mean: int, bounds: Array, values_K: Array) -> int:
    """Fill in the values and return how many words they take; -1 when the bits spell none.

    `words` ends in two words of zeros: a unary number that runs into them has no end, and stops the loop.
    """
    bit_at, k = _ZERO, _parameter(0, mean, bounds)
    for i in range(np.uint64(values_K.size)):
        k = _parameter(k, mean, bounds)
        at, fill = bit_at >> _LOG_WORD, bit_at & _LAST_BIT
        if at + _ONE >= np.uint64(words.size):
            return -1
        bits = words[at] >> fill | (words[at + _ONE] << _ONE) << (_LAST_BIT - fill)
        unary = bits & _UNARY_MASK
        if unary == _ZERO:
            return -1
        lowest = np.int64(unary & (~unary + _ONE))
        quotient = np.uint64((np.float64(lowest).view(np.int64) >> 52) - 1023)
        bits = bits >> quotient >> _ONE
        low_bits, value = np.uint64(k), quotient << np.uint64(k)
        if quotient == _ESCAPE:
            low_bits, value = _ESCAPED_BITS, _ZERO
        value |= bits & ((_ONE << low_bits) - _ONE)
        values_K[i] = value & _LOW_32
        bit_at += quotient + _ONE + low_bits
        mean = next_mean(mean, value)
    return int((bit_at + _LAST_BIT) >> _LOG_WORD)
