"""Joins the changes of a tensor's segments, composes those of successive versions, and inverts them. Pure.

Legend: K changed elements of a segment or tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from weightline.codec.steps import apply_steps, steps
from weightline.types import Changes, whole


def join_parts(parts: Sequence[Changes]) -> Changes:
    """Returns the changes of a whole tensor from those of its disjoint segments, all relative to the same state."""
    if len(parts) == 1 and parts[0].segment == whole(parts[0].segment.tensor):
        return parts[0]
    ordered = sorted(parts, key=lambda part: part.segment.start)
    return Changes(
        whole(ordered[0].segment.tensor),
        np.concatenate([part.positions_K + part.segment.start for part in ordered]),
        np.concatenate([part.old_K for part in ordered]),
        np.concatenate([part.new_K for part in ordered]),
    )


def compose(first: Changes, second: Changes) -> Changes:
    """Returns the changes from the state before `first` to the state after `second`, both of the same whole tensor.

    Elements that return to their first bits are left out.
    """
    positions_K = np.union1d(first.positions_K, second.positions_K)
    old_K = np.empty(positions_K.size, first.old_K.dtype)
    new_K = np.empty_like(old_K)
    at_first = np.searchsorted(positions_K, first.positions_K)
    at_second = np.searchsorted(positions_K, second.positions_K)
    # The order matters: for an element in both, the old bits are those of `first`, the new bits those of `second`.
    old_K[at_second], old_K[at_first] = second.old_K, first.old_K
    new_K[at_first], new_K[at_second] = first.new_K, second.new_K
    is_changed = old_K != new_K
    return Changes(first.segment, positions_K[is_changed], old_K[is_changed], new_K[is_changed])


def inverse(changes: Changes) -> Changes:
    """Returns the changes in the opposite direction: old and new bits are exchanged."""
    return Changes(changes.segment, changes.positions_K, changes.new_K, changes.old_K)


def undo_decoded(forward_from_new: Changes) -> Changes:
    """Returns the changes back to the state before a delta that was decoded against the state *after* it.

    Decoding adds each step to the given bits. Added to the new bits, the sum is meaningless, but the step is correct,
    and subtracting it gives the old bits (steps wrap around, so no bit pattern is lost).
    """
    dtype = forward_from_new.segment.tensor.dtype
    new_K = forward_from_new.old_K
    steps_K = steps(new_K, forward_from_new.new_K, dtype)
    old_K = apply_steps(new_K, -steps_K, dtype)
    return Changes(forward_from_new.segment, forward_from_new.positions_K, new_K, old_K)
