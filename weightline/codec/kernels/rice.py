"""The loops of adaptive Rice coding. What they compute is stated in weightline/codec/rice.py and SPEC.md.

Bits fill 64-bit words from the lowest up. Branches that depend on a value seldom go the other way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit
from weightline.codec.kernels.geometric import next_mean, tame_mean
from weightline.codec.kernels.ricelanes import LANES, put_codes

Array = npt.NDArray[Any]

State = tuple[np.uint64, np.uint64, np.uint64]

_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TWO = np.uint64(2)
_THREE = np.uint64(3)
_LANES = np.uint64(LANES)
#: The largest parameter that eight values are coded at once around: with larger ones, four codes seldom fit a word.
_MAX_PARAMETER = np.uint64(12)
#: Of a code that has 32 bits, how many are not the parameter's, nor the one after the quotient.
_QUOTIENT_BITS = np.uint64(31)
#: From this mean on, one of the next eight may have more than 31 bits above the unused ones.
_MAX_MEAN = np.int64(1 << 38)
_FRACTION_BITS = 16
_LOG_CLIP = 3
#: All bounds are multiples of 2**10.
_UNUSED_BITS = np.int64(10)
_NOWHERE = np.int64(0)
_NEVER = np.int64(-1)
_WORD_BITS = np.uint64(64)
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


@jit
def _put_values(values_K: Array, first: Any, stop: Any, mean: Any, bounds: Array, words: Array, state: State) -> State:
    """Append the values [first, stop), one by one, from the mean before the first."""
    k = _ZERO
    for i in range(first, stop):
        value = np.uint64(values_K[i])
        k = _parameter(k, mean, bounds)
        state = _put_value(words, state, value, k)
        mean = next_mean(mean, value)
    return state


@jit
def _set_limits(limits: Array, mean: Any, bounds: Array) -> None:
    """For put_codes: the parameter that serves the mean, the one before and the one after; none if they are large."""
    k = _parameter(_ZERO, mean, bounds)
    least = max(k, _ONE) - _ONE
    for n in range(_LANES):
        limits[0, n], limits[1, n] = least, bounds[least - _ONE] >> _UNUSED_BITS if least > _ZERO else _NOWHERE
        for row in range(_THREE):
            limits[_TWO + row, n] = (bounds[least + row] >> _UNUSED_BITS) - 1 if k <= _MAX_PARAMETER else _NEVER
        limits[_TWO + _THREE, n] = min(_ESCAPE - _ONE, _QUOTIENT_BITS - min(least + _TWO, _QUOTIENT_BITS))


@inlined
def _put_means(values_K: Array, first: Any, mean: Any, means: Array, place: Any) -> Any:
    """Write the mean before each of eight values, without its unused bits; return the one after."""
    for n in range(_LANES):
        value = np.uint64(values_K[first + n])
        means[place + n] = np.uint32(mean >> _UNUSED_BITS)
        is_large = np.int64(value) << _FRACTION_BITS > mean << _LOG_CLIP
        mean = next_mean(mean, value) if is_large else tame_mean(mean, value)
    return mean


@jit
def encode(values_K: Array, mean: int, bounds: Array, words: Array) -> int:
    """Write the values' bits; return how many words they take.

    Each mean waits for the one before. So the means of eight values are computed while the eight before are coded, all
    at once; but one by one where a value is escaped or a mean has left the limits, as seldom happens.
    """
    state, size, before = (_ZERO, _ZERO, _ZERO), np.uint64(values_K.size), mean
    means, limits = np.empty(_TWO * _LANES, np.uint32), np.empty((6, _LANES), np.int32)
    codes_2, lengths_2 = np.empty(_TWO, np.uint64), np.empty(_TWO, np.uint64)
    whole = size & ~(_LANES - _ONE)
    _set_limits(limits, mean, bounds)
    for first in range(_ZERO, whole + _LANES, _LANES):
        start, place = mean, first & _LANES
        if first < whole:
            mean = _put_means(values_K, first, mean, means, place)
        if first > _ZERO:
            missing = put_codes(values_K, first - _LANES, means, place ^ _LANES, limits, codes_2, lengths_2)
            if missing or max(lengths_2[0], lengths_2[1]) > _WORD_BITS or before >= _MAX_MEAN:
                state = _put_values(values_K, first - _LANES, first, before, bounds, words, state)
                _set_limits(limits, start, bounds)
            else:
                state = _put(words, state, codes_2[0], lengths_2[0])
                state = _put(words, state, codes_2[1], lengths_2[1])
        before = start
    state = _put_values(values_K, whole, size, mean, bounds, words, state)
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
