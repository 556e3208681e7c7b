"""Find changed elements again from their gaps within classes, and apply steps to the elements that they change.

`locate` goes block by block. Of each of the frequent classes, the lanes of a group of 64 elements are a word of 64
bits, and the numbers of ones before each group are kept: the element of a given rank is in the first group with enough
ones, at the bit of the rank that is left. So no work is done for an element, except for those that change and those of
rare classes. A rare class is one of small or of large weights. Small ones change so often that whether they do cannot
be predicted, so no branch depends on it.

Legend: N elements, B elements of a block, G groups of 64 of a block, K changed elements, C classes, F frequent classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit
from weightline.codec.kernels.lanes import GROUP, count_ones, equal
from weightline.codec.kernels.scan import (
    BLOCK,
    LOG_GROUP,
    NUM_CLASSES,
    NUM_FREQUENT,
    classify,
    find_frequent,
    list_bits,
)

Array = npt.NDArray[Any]

_GROUP = np.uint64(GROUP)
_ALL_LANES = np.uint64((1 << GROUP) - 1)
_LAST_LANE = np.uint64(GROUP - 1)
_NUM_GROUPS = BLOCK >> LOG_GROUP
#: Changes of a group that are listed whether they are there or not, which no branch depends on.
_USUAL_CHANGES = np.uint64(3)
_USUAL_RARE = np.uint64(2)
_NEVER = np.uint64(1 << 62)
_ZERO, _ONE, _TWO, _FOUR, _EIGHT = (np.uint64(number) for number in (0, 1, 2, 4, 8))

_IN_TWO = np.uint64(0x5555555555555555)
_IN_FOUR = np.uint64(0x3333333333333333)
_IN_EIGHT = np.uint64(0x0F0F0F0F0F0F0F0F)
_EACH_BYTE = np.uint64(0x0101010101010101)
_TOP_OF_BYTES = np.uint64(0x8080808080808080)
_BYTE = np.uint64(0xFF)
#: By rank << 8 | byte: the index of the set bit of the byte that has `rank` set ones below it.
_BIT_OF_RANK = np.array(
    [([n for n in range(8) if byte >> n & 1] + [0] * 8)[rank] for rank in range(8) for byte in range(256)], np.uint8
)


@inlined
def _one_of_rank(bits: Any, rank: Any) -> Any:
    """The index of the set bit that has `rank` set ones below it. There is one."""
    sums = bits - ((bits >> _ONE) & _IN_TWO)
    sums = (sums & _IN_FOUR) + ((sums >> _TWO) & _IN_FOUR)
    sums = ((sums + (sums >> _FOUR)) & _IN_EIGHT) * _EACH_BYTE  # byte i: the ones in bytes 0 to i
    passed = ((rank * _EACH_BYTE) | _TOP_OF_BYTES) - sums  # the top bit of byte i: whether rank >= its sum
    shift = count_ones(passed & _TOP_OF_BYTES) * _EIGHT
    rank_in_byte = rank - (((sums << _EIGHT) >> shift) & _BYTE)
    return shift + np.uint64(_BIT_OF_RANK[(rank_in_byte << _EIGHT) | ((bits >> shift) & _BYTE)])


@inlined
def _moved(old: Any, step: Any, sign: Any, flip: Any, full: Any) -> Any:
    """The bits `step` further on in the order of the values. See weightline/codec/steps.py.

    full: a mask of the dtype's bits; sign, flip: its sign and all of its bits for floats, zero for integers.
    """
    ordered = (old ^ (flip if old & sign else sign)) + step & full
    return ordered ^ (sign if ordered & sign else flip)


@inlined
def _count_lanes(
    classes_B: Array, length: Any, frequent_F: Array, lanes_FG: Array, before_FG: Array, rare_B: Array
) -> Any:
    """For each frequent class the lanes of each group, and its elements before each; return how many places are rare.

    before_FG has one more entry for each class, its elements up to the block's end; the first goes on from the last
    block. rare_B: the places of all other elements.
    """
    num_rare = _ZERO
    for group in range(_NUM_GROUPS):
        base = group << LOG_GROUP
        valid = _ALL_LANES
        if length < base + _GROUP:
            valid = (_ONE << (length - base)) - _ONE if length > base else _ZERO
        rest = valid
        for n in range(NUM_FREQUENT):
            lanes = equal(classes_B, base, frequent_F[n]) & valid
            rest &= ~lanes
            entry = n * _NUM_GROUPS + group
            lanes_FG[entry] = lanes
            before_FG[entry + n + _ONE] = before_FG[entry + n] + count_ones(lanes)
        num_rare = list_bits(rest, _USUAL_RARE, base, rare_B, num_rare)
    return num_rare


@inlined
def _group_of(rank: Any, first: Any, before_FG: Array) -> Any:
    """The group of a block that holds the element of this rank in the frequent class."""
    group, small = np.uint32(0), np.uint32(rank)
    for row in range(_NUM_GROUPS):
        group += np.uint32(before_FG[first + row + _ONE] <= small)
    return np.uint64(group)


@inlined
def _find_frequent_changes(
    frequent_F: Array, lanes_FG: Array, before_FG: Array, gaps_K: Array, ranks_C: Array, next_C: Array, stop_C: Array,
    changed_G: Array, at_B: Array,
) -> None:  # fmt: skip
    """Mark the changes of the frequent classes in a block, and where in gaps_K each stands."""
    for n in range(NUM_FREQUENT):
        kind, first = np.uint64(frequent_F[n]), n * (_NUM_GROUPS + _ONE)
        stop, rank = np.uint64(before_FG[first + _NUM_GROUPS]), ranks_C[kind]
        here, last = next_C[kind], stop_C[kind]
        while rank < stop:
            group = _group_of(rank, first, before_FG)
            lane = _one_of_rank(lanes_FG[n * _NUM_GROUPS + group], rank - np.uint64(before_FG[first + group]))
            changed_G[group] |= _ONE << lane
            at_B[(group << LOG_GROUP) + lane] = here
            here += _ONE
            rank = rank + _ONE + gaps_K[here] if here < last else _NEVER
        ranks_C[kind], next_C[kind], before_FG[first] = rank, here, stop


@inlined
def _find_rare_changes(
    classes_B: Array, rare_B: Array, num_rare: Any, seen_C: Array, gaps_K: Array, ranks_C: Array, next_C: Array,
    stop_C: Array, changed_G: Array, at_B: Array,
) -> None:  # fmt: skip
    """Mark those of all other classes, element by element; `seen_C` counts their elements."""
    last_gap = np.uint64(gaps_K.size - 1)
    for n in range(num_rare):
        place = np.uint64(rare_B[n])
        kind = np.uint64(classes_B[place])
        rank, here = ranks_C[kind], next_C[kind]
        is_changed = np.uint64(seen_C[kind] == rank)
        changed_G[place >> LOG_GROUP] |= is_changed << (place & _LAST_LANE)
        at_B[place] = here
        after = here + is_changed
        following = rank + is_changed + gaps_K[min(after, last_gap)]
        following = following if after < stop_C[kind] else _NEVER
        next_C[kind], ranks_C[kind] = after, (following if is_changed else rank)
        seen_C[kind] += _ONE


@jit
def locate(
    base_N: Array, shift: np.uint64, mask: np.uint64, gaps_K: Array, ranks_C: Array, next_C: Array, stop_C: Array,
    steps_K: Array, sign: np.uint64, flip: np.uint64, full: np.uint64,
    positions_K: Array, old_K: Array, new_K: Array,
) -> np.uint64:  # fmt: skip
    """Find the changed elements whose gaps, class after class, are `gaps_K`, and their new bits; return how many.

    For each class `ranks_C`: elements of the class before its next change; `next_C`: where in gaps_K and steps_K that
    change stands, `stop_C`: where the class ends. Stops when positions_K is full.
    """
    found, room = _ZERO, np.uint64(positions_K.size)
    if not room:
        return found
    classes_B, at_B = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint64)
    places_B, rare_B = np.empty(BLOCK + _GROUP, np.uint16), np.empty(BLOCK + _GROUP, np.uint16)
    frequent_F, which_C = np.empty(NUM_FREQUENT, np.uint8), np.empty(NUM_CLASSES, np.uint8)
    lanes_FG = np.empty(NUM_FREQUENT * _NUM_GROUPS, np.uint64)
    before_FG = np.zeros(lanes_FG.size + NUM_FREQUENT, np.uint32)
    changed_G, seen_C = np.zeros(_NUM_GROUPS, np.uint64), np.zeros(NUM_CLASSES, np.uint64)
    size = np.uint64(base_N.size)
    find_frequent(base_N, _ZERO, size, shift, mask, frequent_F, which_C)
    for block in range(_ZERO, size, BLOCK):
        end, num = min(block + BLOCK, size), _ZERO
        classify(base_N, block, end, shift, mask, classes_B)
        num_rare = _count_lanes(classes_B, end - block, frequent_F, lanes_FG, before_FG, rare_B)
        _find_frequent_changes(
            frequent_F, lanes_FG, before_FG, gaps_K, ranks_C, next_C, stop_C, changed_G, at_B
        )  # fmt: skip
        _find_rare_changes(
            classes_B, rare_B, num_rare, seen_C, gaps_K, ranks_C, next_C, stop_C, changed_G, at_B
        )  # fmt: skip
        for group in range(_NUM_GROUPS):
            num = list_bits(changed_G[group], _USUAL_CHANGES, group << LOG_GROUP, places_B, num)
            changed_G[group] = _ZERO
        if found + num > room:
            return found
        for n in range(num):
            place = np.uint64(places_B[n])
            old = np.uint64(base_N[block + place])
            positions_K[found + n], old_K[found + n] = block + place, old
            new_K[found + n] = _moved(old, np.uint64(steps_K[at_B[place]]), sign, flip, full)
        found += num
    return found


@jit
def step_at(
    base_N: Array, positions_K: Array, steps_K: Array, sign: np.uint64, flip: np.uint64, full: np.uint64,
    old_K: Array, new_K: Array,
) -> None:  # fmt: skip
    """Look up the elements at the positions, which lie within the base, and move each by its step."""
    for k in range(np.uint64(positions_K.size)):
        old = np.uint64(base_N[np.uint64(positions_K[k])])
        old_K[k] = old
        new_K[k] = _moved(old, np.uint64(steps_K[k]), sign, flip, full)
