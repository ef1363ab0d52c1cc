"""Compiled loops that fused forms share.

Each step rounds as the torch form's does: products and sums are separate operations (no fused
multiply-add), sums run over the experts in order. Stored elements are loaded in the dtype to
compute in: bfloat16 bits (uint16) as float32, float32 as float64.

Shapes: K experts, n elements.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic, overload

from mergewell.kernels.compiler import fused, inlined

TILE = 4096
"""Elements over which sums are made in the dtype to compute in."""

STEP = 512
"""Elements that the loops work on at a time, so that what they share stays in the first cache."""

AHEAD = 2048
"""Elements between those that are worked on and those that are asked for from memory."""

LANES = 256
"""Sums that run side by side, so that they can be vectorised without changing their order."""


@intrinsic
def _bits_as_float(_, bits):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), code


@intrinsic
def _float_as_bits(_, value):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), code


@intrinsic
def _pointer(_, address):
    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def _prefetch(_, address):
    def code(context, builder, signature, arguments):
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        to_read, near, data = number(0), number(3), number(1)
        builder.call(ask, [builder.inttoptr(arguments[0], pointer), to_read, near, data])
        return context.get_dummy_value()

    return types.void(types.int64), code


@inlined
def ask_for(address, start, size, like):
    """Ask for the elements that will be worked on when [start, start + STEP) of `size` is past.

    A core sees by itself what a loop will read next, but not across pages, nor in many arrays.
    """
    first = min(start + AHEAD, size) * like.itemsize
    for byte in range(first, min(start + AHEAD + STEP, size) * like.itemsize, 64):
        _prefetch(address + byte)


@inlined
def ask_for_all(base, experts, start):
    """Ask for the base's and all experts' elements, as `ask_for` does for one array."""
    ask_for(base.ctypes.data, start, base.size, base)
    for k in range(experts.size):
        ask_for(experts[k], start, base.size, base)


@inlined
def part_of(experts, k, start, stop, like):
    """Return elements [start, stop) of the k-th expert, of the dtype of `like`.

    experts: int64 [K], addresses: compiled loops then do not depend on how many there are.
    """
    return carray(_pointer(experts[k] + start * like.itemsize), stop - start, like.dtype)


def load(array, i):
    """Return a stored element in the dtype to compute in."""
    raise NotImplementedError


@overload(load, inline="always")
def _load(array, i):
    if array.dtype == types.uint16:
        return lambda array, i: _bits_as_float(np.uint32(array[i]) << np.uint32(16))
    return lambda array, i: np.float64(array[i])


def store(array, i, value):
    """Round a computed value to the stored dtype, to nearest, ties to even."""
    raise NotImplementedError


@overload(store, inline="always")
def _store(array, i, value):
    if array.dtype == types.uint16:

        def store_bfloat16(array, i, value):
            bits = _float_as_bits(value)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            array[i] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

        return store_bfloat16

    def store_float32(array, i, value):
        array[i] = np.float32(value)

    return store_float32


@inlined
def magnitude_key(value):
    """Return |x| rounded to float32 as int32 bits, which sort as magnitudes do."""
    return np.int32(_float_as_bits(np.float32(abs(value))))


def not_finite_mark(array, i):
    """Return 0 for a finite element and another 16-bit number for NaN and Inf."""
    raise NotImplementedError


@overload(not_finite_mark, inline="always")
def _not_finite_mark(array, i):
    if array.dtype == types.uint16:
        # an exponent of ones, and nothing else, carries into the uppermost bit
        return lambda array, i: (
            ((array[i] & np.uint16(0x7F80)) + np.uint16(0x80)) & np.uint16(0x8000)
        )
    return lambda array, i: np.uint16(array[i] - array[i] != 0)


@inlined
def count_marks(marks):
    """Return how many of at most TILE marks are 1."""
    count = np.int32(0)
    for i in range(marks.size):
        count += marks[i]
    return count


@fused
def watch(array, marks):
    """Mark in marks [LANES] where a tile holds NaN or Inf."""
    for start in range(0, array.size, LANES):
        part = array[start : start + LANES]
        for i in range(part.size):
            marks[i] |= not_finite_mark(part, i)


@fused
def not_finite(array):
    """Return whether any element is NaN or Inf."""
    marks = np.zeros(LANES, np.uint16)
    watch(array, marks)
    return marks.any()


def differs(new, old, i):
    """Return whether two stored elements are different numbers, as a 16-bit number."""
    raise NotImplementedError


@overload(differs, inline="always")
def _differs(new, old, i):
    if new.dtype == types.uint16:
        # other bits, but for the two zeros
        return lambda new, old, i: np.uint16(
            ((new[i] ^ old[i]) != 0) & (((new[i] | old[i]) & np.uint16(0x7FFF)) != 0)
        )
    return lambda new, old, i: np.uint16(new[i] != old[i])


@fused
def compare(merged, reference, marks, lanes):
    """Add what some of a tile says to the marks and to the sums of that tile; see `account`."""
    moved, size, bad, changed = lanes[0], lanes[1], marks[0], marks[1]
    for start in range(0, merged.size, LANES):
        new, old = merged[start : start + LANES], reference[start : start + LANES]
        for i in range(new.size):
            x, y = load(new, i), load(old, i)
            moved[i] += (x - y) * (x - y)
            size[i] += y * y
        for i in range(new.size):
            bad[i] |= not_finite_mark(new, i) | not_finite_mark(old, i)
            changed[i] |= differs(new, old, i)


@fused
def fold(lanes, sums):
    """Add the sums of a tile to those of the block, in float64, and begin the next tile's."""
    for i in range(LANES):
        sums[0, i] += lanes[0, i]
        sums[1, i] += lanes[1, i]
    lanes[:] = 0


@fused
def account(merged, reference, marks, lanes, sums):
    """Add what a tile of the result says to the tally of a block; see `tallied`.

    marks: uint16 [2, LANES], where it or the reference is not finite, and where they differ;
    lanes: [2, LANES] in the dtype to compute in, scratch; sums: float64 [2, LANES], squared
    differences and originals.
    The sums of a tile are made in the dtype to compute in, those of tiles in float64.
    """
    lanes[:] = 0
    compare(merged, reference, marks, lanes)
    fold(lanes, sums)


@fused
def tallied(marks, sums):
    """Return whether all was finite, whether any changed, squared differences and originals."""
    return not marks[0].any(), marks[1].any(), sums[0].sum(), sums[1].sum()


@fused
def average(experts, coefficients, total, normalize, reference, out) -> Any:
    """Store sum_k c_k x_k, divided by `total` if asked; return the tally.

    What is not finite in an input is not finite in the result, so only that is looked at.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), coefficients.dtype)
    tile = np.empty(STEP, coefficients.dtype)
    for start in range(0, out.size, STEP):
        stop = min(start + STEP, out.size)
        for k in range(experts.size):
            ask_for(experts[k], start, out.size, out)
        c, expert = coefficients[0], part_of(experts, 0, start, stop, out)
        for i in range(expert.size):
            tile[i] = c * load(expert, i)
        for k in range(1, experts.size):
            c, expert = coefficients[k], part_of(experts, k, start, stop, out)
            for i in range(expert.size):
                tile[i] = tile[i] + c * load(expert, i)
        part = out[start:stop]
        if normalize:
            for i in range(part.size):
                tile[i] = tile[i] / total
        for i in range(part.size):
            store(part, i, tile[i])
        compare(part, reference[start:stop], marks, lanes)
        if stop % TILE == 0:
            fold(lanes, sums)
    fold(lanes, sums)
    return tallied(marks, sums)


@fused
def task_arithmetic(base, experts, coefficients, divisor, scale, out) -> Any:
    """Store base + scale * sum_k c_k (x_k - base) / divisor; a divisor of 1 changes nothing.

    Returns the tally; what is not finite in an input is not finite in the result.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), coefficients.dtype)
    origin = np.empty(STEP, coefficients.dtype)
    tile = np.empty(STEP, coefficients.dtype)
    for start in range(0, out.size, STEP):
        stop = min(start + STEP, out.size)
        ask_for(base.ctypes.data, start, out.size, out)
        for k in range(experts.size):
            ask_for(experts[k], start, out.size, out)
        own, c = base[start:stop], coefficients[0]
        expert = part_of(experts, 0, start, stop, out)
        for i in range(own.size):
            origin[i] = load(own, i)
            tile[i] = c * (load(expert, i) - origin[i])
        for k in range(1, experts.size):
            c, expert = coefficients[k], part_of(experts, k, start, stop, out)
            for i in range(expert.size):
                tile[i] = tile[i] + c * (load(expert, i) - origin[i])
        part = out[start:stop]
        if divisor != 1:
            for i in range(part.size):
                tile[i] = tile[i] / divisor
        for i in range(part.size):
            store(part, i, origin[i] + scale * tile[i])
        compare(part, own, marks, lanes)
        if stop % TILE == 0:
            fold(lanes, sums)
    fold(lanes, sums)
    return tallied(marks, sums)


@fused
def line(first, second, shares, reference, out) -> Any:
    """Store s_1 x_1 + s_2 x_2; return the tally."""
    left, right = shares[0], shares[1]
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), shares.dtype)
    for start in range(0, out.size, STEP):
        ask_for(first.ctypes.data, start, out.size, out)
        ask_for(second.ctypes.data, start, out.size, out)
        one, two = first[start : start + STEP], second[start : start + STEP]
        part = out[start : start + STEP]
        for i in range(part.size):
            store(part, i, left * load(one, i) + right * load(two, i))
        compare(part, reference[start : start + STEP], marks, lanes)
        if (start + STEP) % TILE == 0:
            fold(lanes, sums)
    fold(lanes, sums)
    return tallied(marks, sums)


@fused
def products(first, second, chunk, sums):
    """Put <x, x>, <x, y> and <y, y> of each chunk into sums [n / chunk, 3], float64.

    LANES sums side by side: their order is fixed but not that of the torch form; they agree to
    1e-15 or so.
    """
    lanes = np.empty((3, LANES), np.float64)
    xx, xy, yy = lanes[0], lanes[1], lanes[2]
    for begin in range(0, first.size, chunk):
        end = min(begin + chunk, first.size)
        lanes[:] = 0
        for start in range(begin, end, LANES):
            stop = min(start + LANES, end)
            if start % STEP == 0:
                ask_for(first.ctypes.data, start, first.size, first)
                ask_for(second.ctypes.data, start, first.size, first)
            one, two = first[start:stop], second[start:stop]
            for i in range(one.size):
                x, y = np.float64(load(one, i)), np.float64(load(two, i))
                xx[i] += x * x
                xy[i] += x * y
                yy[i] += y * y
        for i in range(3):
            sums[begin // chunk, i] = lanes[i].sum()
