"""Vector operations that numba lacks: they compare 64 elements at once and return the results as the bits of one word.

They are LLVM operations on vectors of 64 lanes of any width, which LLVM splits into the processor's registers. Bit i of
a word belongs to lane i. An operation reads 64 elements from a given index, without a bounds check.

Legend: N elements, B elements of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Operation = Callable[..., Any]

GROUP = 64
_WORD = ir.IntType(64)
_INDEX = ir.IntType(32)
_BYTES = ir.VectorType(ir.IntType(8), GROUP)


def operation(describe: Callable[..., Any]) -> Operation:
    """Returns an operation that kernels can call. `describe` returns its signature and the function that emits code."""
    return cast("Operation", intrinsic(describe))


def pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, vector: Any) -> Any:
    """Returns a pointer to an array's elements from `at` on, as this type of vector."""
    start = builder.gep(context.make_array(array_type)(context, builder, array).data, [at])
    return builder.bitcast(start, vector.as_pointer())


def _lanes_at(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    """Returns a pointer to the 64 elements of an array from `at` on."""
    vector = ir.VectorType(ir.IntType(array_type.dtype.bitwidth), GROUP)
    return pointer(context, builder, array_type, array, at, vector)


def in_every(vector: Any, number: int) -> Any:
    """Returns a constant vector whose lanes all hold one number."""
    return ir.Constant(vector, [number] * vector.count)


def _load(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    return builder.load(_lanes_at(context, builder, array_type, array, at), align=array_type.dtype.bitwidth // 8)


def _in_every_lane(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(value.type, GROUP), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_INDEX, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INDEX, GROUP), [0] * GROUP))


@operation
def differing(typing: Any, old_N: Any, new_N: Any, at: Any) -> Any:
    """Returns a mask of those of the 64 elements from `at` on that differ."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        old, new = (_load(context, builder, kind, array, arguments[2]) for kind, array in zip(
            signature.args[:2], arguments[:2], strict=True
        ))  # fmt: skip
        return builder.bitcast(builder.icmp_unsigned("!=", old, new), _WORD)

    return types.uint64(old_N, new_N, types.uint64), write


@operation
def above_zero(typing: Any, numbers_N: Any, at: Any) -> Any:
    """Returns a mask of those of the 64 unsigned numbers from `at` on that are not zero."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _load(context, builder, signature.args[0], *arguments)
        return builder.bitcast(builder.icmp_unsigned("!=", lanes, ir.Constant(lanes.type, None)), _WORD)

    return types.uint64(numbers_N, types.uint64), write


@operation
def equal(typing: Any, bytes_B: Any, at: Any, byte: Any) -> Any:
    """Returns a mask of those of the 64 bytes from `at` on that equal `byte`."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = _load(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.bitcast(builder.icmp_unsigned("==", lanes, _in_every_lane(builder, arguments[2])), _WORD)

    return types.uint64(bytes_B, types.uint64, types.uint8), write


@operation
def put_classes(typing: Any, bits_N: Any, at: Any, shift: Any, mask: Any, classes_B: Any, place: Any) -> Any:
    """Writes the classes, bits >> shift & mask, of the 64 elements from `at` on as bytes from `place` on."""

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits_N, at, shift, mask, classes_B, place = arguments
        lanes = _load(context, builder, signature.args[0], bits_N, at)
        width = lanes.type.element
        shifts, masks = (
            _in_every_lane(builder, number if width == _WORD else builder.trunc(number, width))
            for number in (shift, mask)
        )
        classes = builder.and_(builder.lshr(lanes, shifts), masks)
        if width.width > 8:
            classes = builder.trunc(classes, _BYTES)
        builder.store(classes, _lanes_at(context, builder, signature.args[4], classes_B, place), align=1)
        return context.get_dummy_value()

    return types.void(bits_N, types.uint64, types.uint64, types.uint64, classes_B, types.uint64), write


@operation
def put_steps_16(typing: Any, old_K: Any, new_K: Any, at: Any, float_mask: Any, sizes_K: Any, negative_K: Any) -> Any:
    """Writes the steps s of the 64 elements of 16 bits from `at` on, as |s| - 1 and a flag for negative ones.

    float_mask: the bits below a float's sign; zero for integers.
    """

    def write(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, below = arguments[2], _in_every_lane(builder, builder.trunc(arguments[3], ir.IntType(16)))
        old, new = (_load(context, builder, signature.args[n], arguments[n], at) for n in (0, 1))
        top = in_every(old.type, 15)
        old, new = (builder.xor(bits, builder.and_(builder.ashr(bits, top), below)) for bits in (old, new))
        step = builder.sub(new, old)
        sign = builder.ashr(step, top)
        sizes = builder.sub(builder.xor(step, sign), builder.add(sign, in_every(old.type, 1)))
        negative = builder.trunc(builder.lshr(step, top), _BYTES)
        for n, lanes, nbytes in ((4, sizes, 2), (5, negative, 1)):
            start = pointer(context, builder, signature.args[n], arguments[n], at, lanes.type)
            builder.store(lanes, start, align=nbytes)
        return context.get_dummy_value()

    return types.void(old_K, new_K, types.uint64, types.uint64, sizes_K, negative_K), write


@operation
def count_ones(typing: Any, bits: Any) -> Any:
    """Returns the number of bits that are set."""
    return types.uint64(types.uint64), lambda _context, builder, _signature, arguments: builder.ctpop(arguments[0])


@operation
def lowest_one(typing: Any, bits: Any) -> Any:
    """Returns the index of the lowest bit that is set; 64 when none is."""

    def write(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), write
