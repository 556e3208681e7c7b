"""The loops of adaptive geometric coding. What they compute is stated in weightline/codec/geometric.py and SPEC.md.

Range coder: `low` and `span` are 64-bit; the span stays at 2**32 or above, and a 32-bit word leaves at the top whenever
it would not. A carry out of `low` goes into the last of these words, and on into the words before. Raw bits go to their
own stream, lowest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit

Array = npt.NDArray[Any]
State = tuple[np.uint64, np.uint64, np.uint64]
Coder = tuple[np.uint64, np.uint64, np.uint64]

_WORD = np.uint64(32)
_LOG_WORD = np.uint64(5)
_TOP = np.uint64(1 << 32)
_LOW_WORD = np.uint64((1 << 32) - 1)
_FULL = np.uint64((1 << 64) - 1)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_NOWHERE = np.int64(0)
_PROBABILITY_BITS = np.uint64(16)
_LAST_PROBABILITY = np.uint64((1 << 16) - 1)
_GUESS_BITS = np.uint64(8)
_WIDTH_AT = np.uint64(40)
_BITS_MASK = np.uint64(0xFF)
_FRACTION_BITS = 16
#: A mean's level: exponent and two fraction bits of it as a float64, counted from those of the first level.
_BOUND_BITS = 3
_LEADING_SHIFT = 50
_LEADING_OF_LEVEL_0 = 4 * (1023 + 2)
_RATE_BITS = 6
_LOG_CLIP = 3
_CLIP_AT = np.uint64(3)
_MAX_MEAN = np.uint64(1 << 40)
#: Scaled values below this are in the table of small ones; from that shift on, they may have many raw bits.
_TABLED = np.uint64(64)
_MANY_RAW_BITS = np.uint64(24)
_WHOLE = ~((1 << _FRACTION_BITS) - 1)
#: Values that a writer looks at to choose where a run starts.
_SAMPLE = 512
_SAMPLE_SHIFT = 10
_MAX_TYPICAL_BITS = 36


@jit
def next_mean(mean: Any, value: np.uint64) -> Any:
    """The running mean after a value."""
    seen = np.int64(min(value, _MAX_MEAN)) << _FRACTION_BITS
    limit = ((mean & _WHOLE) << _LOG_CLIP) + (1 << (_FRACTION_BITS + _LOG_CLIP))
    return mean + ((min(seen, limit) - mean) >> _RATE_BITS)


@inlined
def tame_mean(mean: Any, value: np.uint64) -> Any:
    """`next_mean` after a value that is known to be too small to be clipped."""
    return mean + (((np.int64(value) << _FRACTION_BITS) - mean) >> _RATE_BITS)


@jit
def start_means(values_K: Array, counts_R: Array, means_R: Array) -> None:
    """A mean to start each run from, in the running mean's units: of its first values, clipped at a typical one."""
    first = 0
    for run in range(counts_R.size):
        stop = first + min(counts_R[run], _SAMPLE)
        num_bits = 0
        for k in range(first, stop):
            value = np.uint64(values_K[k])
            while value:
                num_bits += 1
                value >>= _ONE
        typical_bits = min(num_bits // max(stop - first, 1), _MAX_TYPICAL_BITS)
        total = np.int64(0)
        for k in range(first, stop):
            total += np.int64(min(np.uint64(values_K[k]), np.uint64(1 << (typical_bits + _LOG_CLIP))))
        means_R[run] = min((total << _SAMPLE_SHIFT) // max(stop - first, 1), np.int64(_MAX_MEAN) << _SAMPLE_SHIFT)
        means_R[run] <<= _FRACTION_BITS - _SAMPLE_SHIFT
        first += counts_R[run]


@jit
def _level(mean: Any) -> np.uint64:
    """The level of a mean: bounds are floating-point numbers of two fraction bits, all multiples of 2**_BOUND_BITS."""
    leading = np.float64(mean >> _BOUND_BITS).view(np.int64) >> _LEADING_SHIFT
    return np.uint64(max(int(leading) - _LEADING_OF_LEVEL_0, 0))


@jit
def _carry(words: Array, at: np.uint64) -> None:
    """Add one to the number that the words before `at` spell."""
    back = at - _ONE
    while words[back] == _LOW_WORD:
        words[back] = 0
        back -= _ONE
    words[back] += np.uint32(1)


@inlined
def _put(words: Array, coder: Coder, start: np.uint64, width: np.uint64, bits: np.uint64) -> Coder:
    """Narrow (low, span) to [start, start + width) of 2**bits parts; then comes where the next word goes.

    Whether a word is full is as good as random: no branch, it is stored in any case and kept when it is.
    """
    low, span, at = coder
    part = span >> bits
    add = part * start
    low += add
    if low < add:
        _carry(words, at)
    words[at] = low >> _WORD
    span = part * width
    is_full = np.uint64(span < _TOP)
    shift = is_full << _LOG_WORD
    return low << shift, span << shift, at + is_full


@inlined
def _put_raw(raws: Array, state: State, value: np.uint64, bits: np.uint64) -> State:
    """Append `bits` (at most 32) raw bits; the state is (bits not yet written, how many, words written)."""
    held, fill, at = state
    held |= value << fill
    fill += bits
    raws[at] = np.uint32(held & _LOW_WORD)
    is_full = fill >> _LOG_WORD
    shift = is_full << _LOG_WORD
    return held >> shift, fill - shift, at + is_full


@jit
def _put_any(
    words: Array, raws: Array, coder: Coder, raw_state: State, value: np.uint64, shift: np.uint64,
    starts_T: Array, bits_T: Array, cumulative_T: Array,
) -> tuple[Coder, State]:  # fmt: skip
    """Write a value of any size: its token, then its raw bits."""
    token = np.uint64(starts_T.size - 1)
    while value >> shift < starts_T[token]:
        token -= _ONE
    start = cumulative_T[token]
    coder = _put(words, coder, start, cumulative_T[token + _ONE] - start, _PROBABILITY_BITS)
    num_raw = bits_T[token] + shift
    if num_raw > _WORD:
        raw_state = _put_raw(raws, raw_state, value & _LOW_WORD, _WORD)
        value, num_raw = value >> _WORD, num_raw - _WORD
    return coder, _put_raw(raws, raw_state, value & ((_ONE << num_raw) - _ONE), num_raw)


@inlined
def _tame_limit(low: Any, shift: np.uint64) -> np.uint64:
    """Under a level that starts at the mean `low`, values below this << shift are not clipped, have an entry in the
    table of small ones and at most a word of raw bits."""
    limit = min(np.uint64((low >> _FRACTION_BITS) + 1) << _CLIP_AT >> shift, _TABLED)
    return limit if shift < _MANY_RAW_BITS else _ZERO


@jit
def encode_runs(
    values_K: Array, counts_R: Array, means_R: Array,
    bounds_L: Array, shifts_L: Array, rows_L: Array, cumulative: Array, small: Array, starts_T: Array, bits_T: Array,
    words: Array, raws: Array,
) -> tuple[np.uint64, np.uint64]:  # fmt: skip
    """Write the words of the tokens and those of the raw bits; return how many of each.

    A value's bucket starts at a multiple of its width, so the raw bits are the value's lowest ones.
    """
    coder, raw_state, k = (_ZERO, _FULL, _ZERO), (_ZERO, _ZERO, _ZERO), _ZERO
    # Of the current level, looked up again when the mean leaves [low, high).
    low, high, shift, row, limit, entry = _NOWHERE, _NOWHERE, _ZERO, _ZERO, _ZERO, _ZERO
    entries, row_length = small.reshape(-1), np.uint64(small.shape[1])
    for run in range(counts_R.size):
        mean = means_R[run]
        for _ in range(counts_R[run]):
            if mean < low or mean >= high:
                level = _level(mean)
                low, high, shift, row = bounds_L[level], bounds_L[level + _ONE], shifts_L[level], rows_L[level]
                limit, entry = _tame_limit(low, shift), row * row_length
            value = np.uint64(values_K[k])
            if value >> shift < limit:
                packed = entries[entry + (value >> shift)]
                start, width, num_raw = packed & _LOW_WORD, packed >> _WIDTH_AT, (packed >> _WORD) & _BITS_MASK
                coder, num_raw = _put(words, coder, start, width, _PROBABILITY_BITS), num_raw + shift
                if num_raw:
                    raw_state = _put_raw(raws, raw_state, value & ((_ONE << num_raw) - _ONE), num_raw)
                mean = tame_mean(mean, value)
            else:
                coder, raw_state = _put_any(
                    words, raws, coder, raw_state, value, shift, starts_T, bits_T, cumulative[row]
                )
                mean = next_mean(mean, value)
            k += _ONE
    # Round low up to whole words: any number in [low, low + span) will do, and the span holds one of those.
    coder = _put(words, (coder[0], _ONE, coder[2]), _LOW_WORD, _ONE, _ZERO)
    raw_state = _put_raw(raws, raw_state, _ZERO, _WORD - _ONE)
    return coder[2], raw_state[2]


@jit
def _next_word(words: Array, at: np.uint64) -> np.uint64:
    """A word; beyond the end they read as zero."""
    return np.uint64(words[at]) if at < words.size else _ZERO


@jit
def _get_raw(raws: Array, state: State, bits: np.uint64) -> tuple[np.uint64, State]:
    """The next `bits` (at most 32) raw bits."""
    held, fill, at = state
    if fill < bits:
        held |= _next_word(raws, at) << fill
        fill += _WORD
        at += _ONE
    return held & ((_ONE << bits) - _ONE), (held >> bits, fill - bits, at)


@jit
def decode_runs(
    words: Array, raws: Array, counts_R: Array, means_R: Array,
    bounds_L: Array, shifts_L: Array, rows_L: Array, cumulative: Array, guesses: Array, starts_T: Array, bits_T: Array,
    values_K: Array,
) -> tuple[np.uint64, np.uint64]:  # fmt: skip
    """Fill in the values; return how many words of tokens and of raw bits the stream must have."""
    code = _next_word(words, _ZERO) << _WORD | _next_word(words, _ONE)
    span, at, raw_state = _FULL, np.uint64(2), (_ZERO, _ZERO, _ZERO)
    k, low, high, shift, row = _ZERO, _NOWHERE, _NOWHERE, _ZERO, _ZERO
    for run in range(counts_R.size):
        mean = means_R[run]
        for _ in range(counts_R[run]):
            if mean < low or mean >= high:
                level = _level(mean)
                low, high, shift, row = bounds_L[level], bounds_L[level + _ONE], shifts_L[level], rows_L[level]
            part = span >> _PROBABILITY_BITS
            place = min(code // part, _LAST_PROBABILITY)
            token = guesses[row, place >> _GUESS_BITS]
            while place >= cumulative[row, token + _ONE]:
                token += _ONE
            code -= part * cumulative[row, token]
            span = part * (cumulative[row, token + _ONE] - cumulative[row, token])
            if span < _TOP:
                code = code << _WORD | _next_word(words, at)
                span <<= _WORD
                at += _ONE
            num_raw, raw = bits_T[token] + shift, _ZERO
            if num_raw > _WORD:
                raw, raw_state = _get_raw(raws, raw_state, _WORD)
                top, raw_state = _get_raw(raws, raw_state, num_raw - _WORD)
                raw |= top << _WORD
            else:
                raw, raw_state = _get_raw(raws, raw_state, num_raw)
            value = (starts_T[token] << shift) + raw
            values_K[k] = value
            mean = next_mean(mean, value)
            k += _ONE
    return at - _ONE, raw_state[2]
