"""The coding `gap`: distances between changed elements, independent of the base. It is the fastest coding.

The pieces of a chunk are laid end to end; a gap is the number of unchanged elements before a changed one.

    positions stream = level, then one geometric stream of one run: the gaps
                     | 256 + parameter, then one Rice stream: the gaps

The writer chooses the Rice stream, which takes half the time, unless changes are dense.

Legend: K changed elements of the chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from weightline.codec.chunknumbers import flatten_changes
from weightline.codec.coding import ChunkBase, Streams
from weightline.codec.geometric import Counts, Numbers, decode_runs, encode_runs, level_of, start_mean
from weightline.codec.rice import LEAST_MEAN, decode_rice, encode_rice, parameter_of
from weightline.codec.steps import StepArray, decode_steps, encode_steps, ordering
from weightline.codec.varint import NumberReader, put_numbers
from weightline.errors import PayloadError
from weightline.types import BitsArray, Changes, Segment

#: Offset of a Rice stream's parameter, by which readers distinguish it from a level.
_RICE = 256


class GapCoding:
    """Gaps and steps in adaptive geometric coding, in the order of the positions."""

    name = "gap"
    ranked = False

    def encode(self, pieces: Sequence[Changes]) -> Streams:
        numbers = flatten_changes(pieces)
        steps = encode_steps(numbers.sizes_K, numbers.negative_K)
        return _encode_positions(numbers.gaps_K), steps

    def decode(
        self, streams: Streams, pieces: Sequence[Segment], num_changed: int, base: ChunkBase
    ) -> Iterator[Changes]:
        dtype = pieces[0].tensor.dtype
        starts = _starts(pieces)
        at_K = _decode_positions(streams[0], num_changed, int(starts[-1]))
        steps_K = decode_steps(streams[1], num_changed, dtype)
        bounds = np.searchsorted(at_K, starts)
        for number, piece in enumerate(pieces):
            if not base.wanted[number]:
                continue
            low, high = bounds[number : number + 2]
            positions_K = at_K[low:high] - starts[number]
            yield _stepped(piece, base.bits(number), positions_K, steps_K[low:high])


def _stepped(piece: Segment, base_N: BitsArray, positions_K: Counts, steps_K: StepArray) -> Changes:
    """Returns the changes of a piece by steps from its base at these positions, which lie within it."""
    from weightline.codec.kernels import locate as kernel

    old_K, new_K = np.empty(positions_K.size, base_N.dtype), np.empty(positions_K.size, base_N.dtype)
    kernel.step_at(base_N, positions_K, steps_K, *ordering(piece.tensor.dtype), old_K, new_K)
    return Changes(piece, positions_K, old_K, new_K)


def _starts(pieces: Sequence[Segment]) -> Counts:
    """Returns the start of each piece in the chunk, and the end of the last one."""
    return np.cumsum([0] + [piece.length for piece in pieces])


def _encode_positions(gaps_K: Numbers) -> bytes:
    if not gaps_K.size:
        return b""
    head, mean = bytearray(), start_mean(gaps_K)
    if mean < LEAST_MEAN:
        level = level_of(mean)
        put_numbers(head, level)
        return encode_runs(gaps_K, np.array([gaps_K.size]), np.array([level]), head)
    parameter = parameter_of(mean)
    put_numbers(head, _RICE + parameter)
    return encode_rice(gaps_K, parameter, head)


def _decode_positions(stream: bytes, num_changed: int, num_elements: int) -> Counts:
    """Returns strictly increasing positions below `num_elements`. PayloadError for a broken stream."""
    if not num_changed:
        if stream:
            raise PayloadError("a stream of no positions has bytes", rule="stream-length")
        return np.zeros(0, np.int64)
    reader = NumberReader(stream, "position-head")
    start = reader.number()
    gaps_K = _decode_gaps(reader.rest(), num_changed, start)
    if int(gaps_K.max()) >= num_elements or int(gaps_K.sum()) + num_changed > num_elements:
        raise PayloadError("a position lies beyond its chunk", rule="position-range")
    return np.cumsum(gaps_K.astype(np.int64) + 1) - 1


def _decode_gaps(stream: bytes, num_changed: int, start: int) -> Numbers:
    if start >= _RICE:
        return decode_rice(stream, num_changed, start - _RICE)
    return decode_runs(stream, np.array([num_changed]), np.array([start]))
