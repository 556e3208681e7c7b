"""Compare two states and collect what differs, and find changed elements again from their gaps within classes.

A collecting kernel scans from `first` to `stop`, writes position (from the segment's start), old and new bits of every
differing element, and returns (number written, where it stopped): it stops early when its output may run full.

Indices are unsigned: numba then leaves out the check for negative ones, which doubles the speed.

Legend: N elements, W the same memory as 64-bit words, K changed elements, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import jit

Array = npt.NDArray[Any]
Progress = tuple[Any, Any]

#: Words compared before the differing ones are looked at: the list of them stays in the first-level cache.
_BLOCK = np.uint64(2048)
_LANES = np.uint64(4)
_LANE_BITS = np.uint64(16)
_LANE = np.uint64(0xFFFF)
_TWO_LANES = np.uint64(0xFFFFFFFF)
_THREE_LANES = np.uint64(0xFFFFFFFFFFFF)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_NEVER = np.int64(1 << 62)


@jit
def collect(
    old_N: Array, new_N: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array
) -> Progress:
    """Any width, element by element."""
    found = _ZERO
    for at in range(first, stop):
        if old_N[at] != new_N[at]:
            if found == np.uint64(positions_K.size):
                return found, at
            positions_K[found], old_K[found], new_K[found] = at, old_N[at], new_N[at]
            found += _ONE
    return found, stop


@jit
def _first_lane(difference: np.uint64) -> np.uint64:
    """The lowest of four 16-bit lanes that is not zero."""
    low, two, three = difference & _LANE, difference & _TWO_LANES, difference & _THREE_LANES
    return np.uint64(low == 0) + np.uint64(two == 0) + np.uint64(three == 0)


@jit
def collect_16(
    old_W: Array, new_W: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array
) -> Progress:
    """16-bit elements, four to a word; `first` and `stop` are words.

    Two passes a block, the first free of branches: one that depends on the data is mispredicted too often.
    """
    words, differences = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    found = _ZERO
    for block in range(first, stop, _BLOCK):
        num_words = _ZERO
        for word in range(block, min(block + _BLOCK, stop)):
            difference = old_W[word] ^ new_W[word]
            words[num_words], differences[num_words] = word, difference
            num_words += np.uint64(difference != 0)
        if found + _LANES * num_words > np.uint64(positions_K.size):
            return found, block
        for n in range(num_words):
            word, difference = words[n], differences[n]
            old, new = old_W[word], new_W[word]
            while difference != 0:
                lane = _first_lane(difference)
                shift = lane * _LANE_BITS
                positions_K[found] = word * _LANES + lane
                old_K[found], new_K[found] = np.uint16(old >> shift), np.uint16(new >> shift)
                found += _ONE
                difference &= ~(_LANE << shift)
    return found, stop


@jit
def collect_ranked(
    old_N: Array, new_N: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array,
    ranks_K: Array, counts_C: Array, shift: np.uint64, mask: np.uint64,
) -> Progress:  # fmt: skip
    """As `collect`; ranks are the numbers of elements of the same class before, counts those of all seen so far."""
    found = _ZERO
    for at in range(first, stop):
        kind = (np.uint64(old_N[at]) >> shift) & mask
        if old_N[at] != new_N[at]:
            if found == np.uint64(positions_K.size):
                return found, at
            positions_K[found], old_K[found], new_K[found] = at, old_N[at], new_N[at]
            ranks_K[found] = counts_C[kind]
            found += _ONE
        counts_C[kind] += np.uint32(1)
    return found, stop


@jit
def _count_lanes(
    counts_0: Array,
    counts_1: Array,
    counts_2: Array,
    counts_3: Array,
    bits: np.uint64,
    shift: np.uint64,
    mask: np.uint64,
) -> None:
    """Count the classes of a word's elements; each lane for itself, so that the four increments overlap."""
    counts_0[(bits >> shift) & mask] += np.uint32(1)
    counts_1[(bits >> (shift + _LANE_BITS)) & mask] += np.uint32(1)
    counts_2[(bits >> (shift + _LANE_BITS * np.uint64(2))) & mask] += np.uint32(1)
    counts_3[(bits >> (shift + _LANE_BITS * np.uint64(3))) & mask] += np.uint32(1)


def _collect_ranked_16(shift_bits: int, mask_bits: int) -> Callable[..., Progress]:
    """`collect_ranked` for 16-bit elements, four to a word; a kernel for each class field: its constants fold in."""
    shift, mask = np.uint64(shift_bits), np.uint64(mask_bits)
    shift_1, shift_2 = shift + _LANE_BITS, shift + _LANE_BITS * np.uint64(2)

    @jit
    def collect_ranked_16(
        old_W: Array, new_W: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array,
        ranks_K: Array, counts_LC: Array,
    ) -> Progress:  # fmt: skip
        counts_0, counts_1, counts_2, counts_3 = counts_LC[0], counts_LC[1], counts_LC[2], counts_LC[3]
        found, word, size = _ZERO, first, np.uint64(positions_K.size)
        while word < stop:
            old, new = old_W[word], new_W[word]
            while old == new:
                _count_lanes(counts_0, counts_1, counts_2, counts_3, old, shift, mask)
                word += _ONE
                if word == stop:
                    return found, stop
                old, new = old_W[word], new_W[word]
            if found + _LANES > size:
                return found, word
            difference = old ^ new
            while difference != 0:
                lane = _first_lane(difference)
                place = lane * _LANE_BITS
                kind = (old >> (place + shift)) & mask
                rank = np.uint64(counts_0[kind] + counts_1[kind] + counts_2[kind] + counts_3[kind])
                rank += np.uint64(lane > 0) & np.uint64(((old >> shift) & mask) == kind)
                rank += np.uint64(lane > 1) & np.uint64(((old >> shift_1) & mask) == kind)
                rank += np.uint64(lane > 2) & np.uint64(((old >> shift_2) & mask) == kind)
                positions_K[found] = word * _LANES + lane
                old_K[found], new_K[found] = np.uint16(old >> place), np.uint16(new >> place)
                ranks_K[found] = np.uint32(rank)
                found += _ONE
                difference &= ~(_LANE << place)
            _count_lanes(counts_0, counts_1, counts_2, counts_3, old, shift, mask)
            word += _ONE
        return found, stop

    return collect_ranked_16


collect_ranked_bf16 = _collect_ranked_16(7, 0xFF)
collect_ranked_f16 = _collect_ranked_16(10, 0x1F)


@jit
def locate(
    base_N: Array, shift: np.uint64, mask: np.uint64, gaps_K: Array, left_C: Array, next_C: Array, stop_C: Array,
    positions_K: Array, order_K: Array,
) -> np.uint64:  # fmt: skip
    """Walk the base and find the changed elements whose gaps, class after class, are `gaps_K`; return how many.

    State that goes on from piece to piece: for each class `left_C`, elements to pass before its next change, and
    `next_C`, where in gaps_K that change stands (`stop_C`: where the class ends). order_K says for each position found
    where in gaps_K it stands. Stops when positions_K is full.
    """
    found = _ZERO
    for at in range(np.uint64(base_N.size)):
        kind = (np.uint64(base_N[at]) >> shift) & mask
        left = left_C[kind]
        if left == 0:
            if found == np.uint64(positions_K.size):
                return found
            here = next_C[kind]
            positions_K[found], order_K[found] = at, here
            found += _ONE
            here += _ONE
            next_C[kind] = here
            left = gaps_K[here] + np.int64(1) if here < stop_C[kind] else _NEVER
        left_C[kind] = left - np.int64(1)
    return found
