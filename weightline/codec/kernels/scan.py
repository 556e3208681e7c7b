"""Compare two states and collect what differs.

A collecting kernel scans from `first` to `stop`, writes position (from the segment's start), old and new bits of every
differing element, and returns (number written, where it stopped): it stops early when its output may run full.

It goes block by block, and a block stays in the first-level cache: 64 elements are compared at once, the places of
those that differ are listed, and the list is followed. Where changes are dense, nearly every branch that depends on the
data is mispredicted, so there are next to none.

Indices are unsigned: numba then leaves out the check for negative ones, which doubles the speed.

Legend: N elements, B elements of a block, K changed elements, C classes, F frequent classes, G groups of 64 of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightline.codec.kernels import inlined, jit
from weightline.codec.kernels.lanes import GROUP, count_ones, differing, equal, lowest_one, put_classes

Array = npt.NDArray[Any]
Progress = tuple[Any, Any]

BLOCK = np.uint64(512)
_GROUP = np.uint64(GROUP)
LOG_GROUP = np.uint64(6)
_LAST_LANE = np.uint64(GROUP - 1)
_ALL_LANES = np.uint64((1 << GROUP) - 1)
_ZERO = np.uint64(0)
_ONE = np.uint64(1)

#: Classes that are counted 64 elements at once. Nine in ten elements of a trained weight are of five classes.
NUM_FREQUENT = np.uint64(8)
NUM_CLASSES = np.uint64(256)
#: Elements that the frequent classes are found from.
_LOG_SAMPLE = np.uint64(10)
#: Set bits of a group that are listed whether they are there or not, which no branch depends on.
_USUAL_CHANGES = np.uint64(4)
_USUAL_RARE = np.uint64(2)


@inlined
def list_bits(bits: Any, usual: Any, base: Any, places_B: Array, num: Any) -> Any:
    """Append base + number of every set bit to `places_B`, which holds `num`; return how many it then holds.

    The first `usual` are written in any case: what is too much is written over by the next ones.
    """
    count = count_ones(bits)
    for n in range(usual):
        places_B[num + n] = base + lowest_one(bits)
        bits &= bits - _ONE
    if count > usual:
        for n in range(usual, count):
            places_B[num + n] = base + lowest_one(bits)
            bits &= bits - _ONE
    return num + count


@inlined
def _list_changes(old_N: Array, new_N: Array, first: Any, stop: Any, places_B: Array) -> Any:
    """The places, counted from `first`, of the elements that differ; return how many."""
    num, length = _ZERO, stop - first
    whole = length & ~_LAST_LANE
    for base in range(_ZERO, whole, _GROUP):
        num = list_bits(differing(old_N, new_N, first + base), _USUAL_CHANGES, base, places_B, num)
    for place in range(whole, length):
        places_B[num] = place
        num += np.uint64(old_N[first + place] != new_N[first + place])
    return num


@jit
def collect(
    old_N: Array, new_N: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array
) -> Progress:
    """Elements of any width."""
    places_B = np.empty(BLOCK + _GROUP, np.uint16)
    found, room = _ZERO, np.uint64(positions_K.size)
    for block in range(first, stop, BLOCK):
        num = _list_changes(old_N, new_N, block, min(block + BLOCK, stop), places_B)
        if found + num > room:
            return found, block
        for n in range(num):
            at = block + np.uint64(places_B[n])
            positions_K[found + n], old_K[found + n], new_K[found + n] = at, old_N[at], new_N[at]
        found += num
    return found, stop


@jit
def find_frequent(
    old_N: Array, first: Any, stop: Any, shift: np.uint64, mask: np.uint64, frequent_F: Array, which_C: Array
) -> None:
    """Choose the classes that a sample has most of, and for each class note which of these it is (none: their number).

    The choice makes the scan fast, whatever it is: the ranks do not depend on it.
    """
    sample_C = np.zeros(NUM_CLASSES, np.int64)
    for at in range(first, stop, max((stop - first) >> _LOG_SAMPLE, _ONE)):
        sample_C[(np.uint64(old_N[at]) >> shift) & mask] += 1
    for kind in range(NUM_CLASSES):
        which_C[kind] = NUM_FREQUENT
    for n in range(NUM_FREQUENT):
        most = _ZERO
        for kind in range(NUM_CLASSES):
            most = np.uint64(kind) if sample_C[kind] > sample_C[most] else most
        frequent_F[n], which_C[most], sample_C[most] = most, n, -1


@inlined
def classify(old_N: Array, first: Any, stop: Any, shift: np.uint64, mask: np.uint64, classes_B: Array) -> None:
    """The classes of a block's elements."""
    whole = (stop - first) & ~_LAST_LANE
    for place in range(_ZERO, whole, _GROUP):
        put_classes(old_N, first + place, shift, mask, classes_B, place)
    for place in range(whole, stop - first):
        classes_B[place] = (np.uint64(old_N[first + place]) >> shift) & mask


@inlined
def _count_frequent(
    classes_B: Array, length: Any, frequent_F: Array, lanes_GF: Array, before_GF: Array, rare_B: Array
) -> tuple[Any, Any]:
    """Of each group the lanes of each frequent class and how many lie before it; return the numbers of groups, rare_B.

    rare_B: the places of all other elements. `before_GF`, flat as `lanes_GF` is, goes on from its first row.
    """
    num_rare, groups = _ZERO, (length + _LAST_LANE) >> LOG_GROUP
    for group in range(groups):
        base, row = group << LOG_GROUP, group * NUM_FREQUENT
        rest = _ALL_LANES if length - base >= _GROUP else (_ONE << (length - base)) - _ONE
        valid = rest
        for n in range(NUM_FREQUENT):
            lanes = equal(classes_B, base, frequent_F[n]) & valid
            rest &= ~lanes
            lanes_GF[row + n] = lanes
            before_GF[row + NUM_FREQUENT + n] = before_GF[row + n] + count_ones(lanes)
        num_rare = list_bits(rest, _USUAL_RARE, base, rare_B, num_rare)
    return groups, num_rare


@inlined
def _rank_rare(classes_B: Array, rare_B: Array, num_rare: np.uint64, counts_C: Array, ranks_B: Array) -> None:
    """Rank the elements of all other classes, one by one."""
    for n in range(num_rare):
        place = np.uint64(rare_B[n])
        kind = np.uint64(classes_B[place])
        rank = counts_C[kind]
        ranks_B[place], counts_C[kind] = rank, rank + np.uint32(1)


@inlined
def _frequent_rank(place: np.uint64, which: np.uint64, lanes_GF: Array, before_GF: Array) -> np.uint32:
    """The rank of the element at `place`, which is of this frequent class."""
    entry = (place >> LOG_GROUP) * NUM_FREQUENT + which
    lanes_before = lanes_GF[entry] & ((_ONE << (place & _LAST_LANE)) - _ONE)
    return np.uint32(before_GF[entry] + count_ones(lanes_before))


@jit
def collect_ranked(
    old_N: Array, new_N: Array, first: np.uint64, stop: np.uint64, positions_K: Array, old_K: Array, new_K: Array,
    ranks_K: Array, counts_C: Array, shift: np.uint64, mask: np.uint64,
) -> Progress:  # fmt: skip
    """As `collect`; ranks are the numbers of elements of the same class before, counts those of all seen so far."""
    places_B, rare_B = np.empty(BLOCK + _GROUP, np.uint16), np.empty(BLOCK + _GROUP, np.uint16)
    classes_B, ranks_B = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint32)
    frequent_F, which_C = np.empty(NUM_FREQUENT, np.uint8), np.empty(NUM_CLASSES, np.uint8)
    lanes_GF = np.empty((BLOCK >> LOG_GROUP) * NUM_FREQUENT, np.uint64)
    before_GF = np.empty(lanes_GF.size + NUM_FREQUENT, np.uint32)
    found, block, room = _ZERO, first, np.uint64(positions_K.size)
    find_frequent(old_N, first, stop, shift, mask, frequent_F, which_C)
    for n in range(NUM_FREQUENT):
        before_GF[n] = counts_C[frequent_F[n]]
    while block < stop:
        end = min(block + BLOCK, stop)
        num = _list_changes(old_N, new_N, block, end, places_B)
        if found + num > room:
            break
        classify(old_N, block, end, shift, mask, classes_B)
        groups, num_rare = _count_frequent(classes_B, end - block, frequent_F, lanes_GF, before_GF, rare_B)
        _rank_rare(classes_B, rare_B, num_rare, counts_C, ranks_B)
        for n in range(num):
            place = np.uint64(places_B[n])
            which, at = np.uint64(which_C[classes_B[place]]), block + place
            rank = _frequent_rank(place, which & (NUM_FREQUENT - _ONE), lanes_GF, before_GF)
            ranks_K[found + n] = rank if which < NUM_FREQUENT else ranks_B[place]
            positions_K[found + n], old_K[found + n], new_K[found + n] = at, old_N[at], new_N[at]
        for n in range(NUM_FREQUENT):
            before_GF[n] = before_GF[groups * NUM_FREQUENT + n]
        found, block = found + num, end
    for n in range(NUM_FREQUENT):
        counts_C[frequent_F[n]] = before_GF[n]
    return found, block
