"""The loops of adaptive Rice coding. What they compute is stated in weightline/codec/rice.py and SPEC.md.

Bits fill 64-bit words from the lowest up. No branch but the change of the parameter depends on a value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit
from weightline.codec.kernels.geometric import next_mean, tame_mean

Array = npt.NDArray[Any]

State = tuple[np.uint64, np.uint64, np.uint64]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_THREE = np.uint64(3)
_FOUR = np.uint64(4)
#: The largest parameter under which four values below 8 << k take at most 64 bits.
_MAX_FOURFOLD = np.uint64(8)
_NOWHERE = np.int64(0)
_STEP = np.int64(1)
_LAST_BIT = np.uint64(63)
_LOG_WORD = np.uint64(6)
_ESCAPE = np.uint64(24)
_UNARY_MASK = np.uint64((1 << 25) - 1)
_ESCAPED_BITS = np.uint64(32)
_LOW_32 = np.uint64((1 << 32) - 1)


@inlined
def _parameter(k: np.uint64, mean: Any, bounds: Array) -> np.uint64:
    """The parameter that serves the mean, found from the last one."""
    while mean >= bounds[k]:
        k += _ONE
    while k > _ZERO and mean < bounds[k - _ONE]:
        k -= _ONE
    return k


@inlined
def _put(words: Array, state: State, code: np.uint64, num_bits: np.uint64) -> State:
    """Append at most 64 bits; the state is (bits not yet in a full word, how many, full words)."""
    held, fill, at = state
    word = held | code << fill
    words[at] = word
    spilled = (code >> _ONE) >> (_LAST_BIT - fill)
    fill += num_bits
    is_full = fill >> _LOG_WORD
    return spilled if is_full else word, fill & _LAST_BIT, at + is_full


@inlined
def _put_value(words: Array, state: State, value: np.uint64, low_bits: np.uint64) -> State:
    """Append any value."""
    quotient = value >> low_bits
    if quotient >= _ESCAPE:
        quotient, low_bits = _ESCAPE, _ESCAPED_BITS
    low = value & ((_ONE << low_bits) - _ONE)
    return _put(words, state, (low << _ONE | _ONE) << quotient, quotient + _ONE + low_bits)


@inlined
def _code(value: np.uint64, k: np.uint64) -> tuple[np.uint64, np.uint64]:
    """(bits, how many) of a value that is not escaped."""
    quotient, low = value >> k, value & ((_ONE << k) - _ONE)
    return (low << _ONE | _ONE) << quotient, quotient + _ONE + k


@inlined
def _put_four(
    words: Array, state: State, k: np.uint64, v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64
) -> State:
    """Append four values below 8 << k; k is at most _MAX_FOURFOLD."""
    c0, n0 = _code(v0, k)
    c1, n1 = _code(v1, k)
    c2, n2 = _code(v2, k)
    c3, n3 = _code(v3, k)
    return _put(words, state, (c0 | c1 << n0) | (c2 | c3 << n2) << (n0 + n1), (n0 + n1) + (n2 + n3))


@jit
def encode(values_K: Array, mean: int, bounds: Array, words: Array) -> int:
    """Write the values' bits; return how many words they take.

    Four values go at once when none is large and one parameter serves them all, as nearly always. A value below 8 << k
    is not clipped, since its mean is at least (1 << k) - 1.
    """
    state, i, k, low, high = (_ZERO, _ZERO, _ZERO), _ZERO, _ZERO, _NOWHERE, _NOWHERE
    size = np.uint64(values_K.size)
    while i < size:
        if mean < low or mean >= high:
            k = _parameter(k, mean, bounds)
            low, high = bounds[k - _ONE] if k > _ZERO else _NOWHERE, bounds[k]
        if i + _FOUR <= size and k <= _MAX_FOURFOLD:
            v0, v1 = np.uint64(values_K[i]), np.uint64(values_K[i + _ONE])
            v2, v3 = np.uint64(values_K[i + _TWO]), np.uint64(values_K[i + _THREE])
            if (v0 | v1 | v2 | v3) >> (k + _THREE) == _ZERO:
                mean_1 = tame_mean(mean, v0)
                mean_2 = tame_mean(mean_1, v1)
                mean_3 = tame_mean(mean_2, v2)
                last = high - _STEP
                within = (mean_1 - low) | (mean_2 - low) | (mean_3 - low)
                within |= (last - mean_1) | (last - mean_2) | (last - mean_3)
                if within >= 0:
                    state = _put_four(words, state, k, v0, v1, v2, v3)
                    mean, i = tame_mean(mean_3, v3), i + _FOUR
                    continue
        value = np.uint64(values_K[i])
        state = _put_value(words, state, value, k)
        mean, i = next_mean(mean, value), i + _ONE
    words[state[2]] = state[0]
    return int(state[2] + np.uint64(state[1] > _ZERO))


@jit
def decode(words: Array, mean: int, bounds: Array, values_K: Array) -> int:
    """Fill in the values and return how many words they take; -1 when the bits spell none.

    `words` ends in two words of zeros: a unary number that runs into them has no end, and stops the loop.
    """
    bit_at, k = _ZERO, _parameter(_ZERO, mean, bounds)
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
        low_bits, value = k, quotient << k
        if quotient == _ESCAPE:
            low_bits, value = _ESCAPED_BITS, _ZERO
        value |= bits & ((_ONE << low_bits) - _ONE)
        values_K[i] = value & _LOW_32
        bit_at += quotient + _ONE + low_bits
        mean = next_mean(mean, value)
    return int((bit_at + _LAST_BIT) >> _LOG_WORD)
