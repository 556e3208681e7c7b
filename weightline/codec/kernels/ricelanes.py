"""Computes eight Rice codes at once with LLVM vectors (see lanes.py), since numba computes 32-bit values in 64 bits."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from weightline.codec.kernels.lanes import in_every, operation, pointer

LANES = 8
_LANES_32 = ir.VectorType(ir.IntType(32), LANES)
_LANES_64 = ir.VectorType(ir.IntType(64), LANES // 2)
_HALVES = ir.VectorType(ir.IntType(64), LANES // 4)
_PLACES = ir.VectorType(ir.IntType(32), LANES // 4)


def _parameters(builder: Any, means: Any, least: Any, limits: list[Any]) -> tuple[Any, Any]:
    """Returns (the parameter of each mean, mask of the means without one).

    The limits are those of the least parameter, the next two, and the one after.
    """
    first, second, third, fourth = limits
    parameters = least
    for limit in (second, third):
        parameters = builder.sub(parameters, builder.sext(builder.icmp_signed(">", means, limit), _LANES_32))
    is_outside = builder.or_(builder.icmp_signed(">", first, means), builder.icmp_signed(">", means, fourth))
    return parameters, is_outside


def _join_words(builder: Any, codes: Any, lengths: Any) -> tuple[Any, Any]:
    """Joins every two adjacent 32-bit codes to one of 64 bits: the bits of the first, then those of the second."""
    low, half = in_every(_LANES_64, (1 << 32) - 1), in_every(_LANES_64, 32)
    codes, lengths = builder.bitcast(codes, _LANES_64), builder.bitcast(lengths, _LANES_64)
    first_lengths = builder.and_(lengths, low)
    seconds = builder.shl(builder.lshr(codes, half), first_lengths)
    return builder.or_(builder.and_(codes, low), seconds), builder.add(first_lengths, builder.lshr(lengths, half))


def _join_pairs(builder: Any, codes: Any, lengths: Any) -> tuple[Any, Any]:
    """Joins every two adjacent codes to one of 64 bits. Bits beyond 64 are lost."""
    undefined = ir.Constant(_LANES_64, ir.Undefined)
    even, odd = ir.Constant(_PLACES, [0, 2]), ir.Constant(_PLACES, [1, 3])
    (first, second), (first_length, second_length) = (
        [builder.shuffle_vector(lanes, undefined, places) for places in (even, odd)] for lanes in (codes, lengths)
    )
    return builder.or_(first, builder.shl(second, first_length)), builder.add(first_length, second_length)


@operation
def put_codes(
    typing: Any, values_K: Any, at: Any, means: Any, place: Any, limits: Any, codes_2: Any, lengths_2: Any
) -> Any:
    """Writes the codes of eight values (32 bits) from `at` on, four in a word, and their numbers of bits.

    means: from `place` on, of each value, below 2**31. limits: six rows of eight equal numbers: a parameter, the least
    mean that it serves, the largest means that it and the next two serve, and the largest quotient, such that a code
    has at most 32 bits. Returns a mask of the values that have no code here. If it is not zero, or a word has more than
    64 bits, the caller must discard the codes.
    """

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values_K, at, means, place, limits, codes_2, lengths_2 = arguments

        def load(number: int, array: Any, at: Any) -> Any:
            lanes = pointer(context, builder, signature.args[number], array, at, _LANES_32)
            return builder.load(lanes, align=4)

        values = load(0, values_K, at)
        rows = (load(4, limits, ir.Constant(ir.IntType(64), LANES * row)) for row in range(6))
        least, *bounds, largest_quotients = rows
        parameters, is_outside = _parameters(builder, load(2, means, place), least, bounds)
        quotients, one = builder.lshr(values, parameters), in_every(_LANES_32, 1)
        is_escaped = builder.icmp_unsigned(">", quotients, largest_quotients)
        low = builder.xor(values, builder.shl(quotients, parameters))
        codes = builder.shl(builder.or_(builder.add(low, low), one), quotients)
        lengths = builder.add(builder.add(quotients, parameters), one)
        joined = _join_pairs(builder, *_join_words(builder, codes, lengths))
        for number, array, lanes in zip((5, 6), (codes_2, lengths_2), joined, strict=True):
            start = pointer(context, builder, signature.args[number], array, ir.Constant(ir.IntType(64), 0), _HALVES)
            builder.store(lanes, start, align=8)
        missing = builder.bitcast(builder.or_(is_outside, is_escaped), ir.IntType(LANES))
        return builder.zext(missing, ir.IntType(64))

    word = types.uint64
    return word(values_K, word, means, word, limits, codes_2, lengths_2), write
