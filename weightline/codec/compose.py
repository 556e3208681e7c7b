"""Changes as things that can be turned round.

Legend: K changed elements of one segment.
"""

from __future__ import annotations

from weightline.codec.steps import apply_steps, steps
from weightline.types import Changes


def inverse(changes: Changes) -> Changes:
    """What leads back: old and new change places."""
    return Changes(changes.segment, changes.positions_K, changes.new_K, changes.old_K)


def taken_back(forward_from_new: Changes) -> Changes:
    """The way back, from a delta that was decoded against the state *after* it.

    Decoding adds each step to the bits at hand; when those are the new ones, the sum means nothing, but the step is
    right, and subtracting it gives the old bits (steps wrap around, so no bit pattern is lost).
    """
    dtype = forward_from_new.segment.tensor.dtype
    new_K = forward_from_new.old_K
    steps_K = steps(new_K, forward_from_new.new_K, dtype)
    old_K = apply_steps(new_K, -steps_K, dtype)
    return Changes(forward_from_new.segment, forward_from_new.positions_K, new_K, old_K)
