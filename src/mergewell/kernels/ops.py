"""Compiled loops that fused forms share.

Each step rounds as the torch form's does: products and sums are separate operations (no fused
multiply-add), sums run over the experts in order. Stored elements are loaded in the dtype to
compute in: bfloat16 bits (uint16) as float32, float32 as float64.

Shapes: K experts, n elements.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

fused = njit(nogil=True, cache=True)
inlined = njit(nogil=True, cache=True, inline="always")

TILE = 8192
"""Elements that the loops work on at a time, so that what they share stays in the first cache."""

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


@inlined
def uniform(position, key):
    """Return a 24-bit random integer for a position (from 1) under a key; see TensorGroup."""
    z = position * np.int64(-7046029254386353131) + key
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * np.int64(-4658895280553007687)
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * np.int64(-7723592293110705685)
    z = z ^ ((z >> 31) & 0x1FFFFFFFF)
    return (z >> 40) & 0xFFFFFF


@fused
def not_finite(array):
    """Return whether any element is NaN or Inf."""
    found = False
    for i in range(array.size):
        value = load(array, i)
        found |= value - value != 0
    return found


@fused
def average(experts, coefficients, total, normalize, out):
    """Store sum_k c_k x_k, divided by `total` if asked."""
    tile = np.empty(TILE, coefficients.dtype)
    for start in range(0, out.size, TILE):
        stop = min(start + TILE, out.size)
        c, expert = coefficients[0], experts[0][start:stop]
        for i in range(expert.size):
            tile[i] = c * load(expert, i)
        for k in range(1, len(experts)):
            c, expert = coefficients[k], experts[k][start:stop]
            for i in range(expert.size):
                tile[i] = tile[i] + c * load(expert, i)
        part = out[start:stop]
        if normalize:
            for i in range(part.size):
                tile[i] = tile[i] / total
        for i in range(part.size):
            store(part, i, tile[i])


@fused
def task_arithmetic(base, experts, coefficients, divisor, scale, out):
    """Store base + scale * sum_k c_k (x_k - base) / divisor; a divisor of 1 changes nothing."""
    origin = np.empty(TILE, coefficients.dtype)
    tile = np.empty(TILE, coefficients.dtype)
    for start in range(0, out.size, TILE):
        stop = min(start + TILE, out.size)
        own, c, expert = base[start:stop], coefficients[0], experts[0][start:stop]
        for i in range(own.size):
            origin[i] = load(own, i)
            tile[i] = c * (load(expert, i) - origin[i])
        for k in range(1, len(experts)):
            c, expert = coefficients[k], experts[k][start:stop]
            for i in range(expert.size):
                tile[i] = tile[i] + c * (load(expert, i) - origin[i])
        part = out[start:stop]
        if divisor != 1:
            for i in range(part.size):
                tile[i] = tile[i] / divisor
        for i in range(part.size):
            store(part, i, origin[i] + scale * tile[i])


@fused
def line(first, second, left, right, out):
    """Store left * x_1 + right * x_2."""
    for i in range(out.size):
        store(out, i, left * load(first, i) + right * load(second, i))


@fused
def trimmed(base, expert, cut, ties_left, out):
    """Put a task vector's entries at or above the key `cut` into out, 0 elsewhere.

    ties_left is how many entries equal to the key may be kept from here on; negative keeps all.
    Returns how many are left afterwards.
    """
    zero = out.dtype.type(0)
    if ties_left < 0:
        for i in range(base.size):
            tau = load(expert, i) - load(base, i)
            out[i] = tau if magnitude_key(tau) >= cut else zero
        return ties_left
    for i in range(base.size):
        tau = load(expert, i) - load(base, i)
        out[i] = tau if magnitude_key(tau) > cut else zero
    for i in range(base.size):
        if ties_left == 0:
            break
        tau = load(expert, i) - load(base, i)
        if magnitude_key(tau) == cut:
            out[i] = tau
            ties_left -= 1
    return ties_left


@fused
def combine(taus, coefficients, agreeing, count, weighted, divide, scale, base, out):
    """Store base + scale * the combination of K thinned task vectors, taus [K, TILE].

    agreeing: elect signs (by count or mass, of weighted or plain task vectors) and keep what
    agrees; otherwise add up. divide: 0 not at all, 1 by how many (agree), 2 by coefficients.
    base, out: [n], n at most TILE.
    """
    one = coefficients.dtype.type(1)
    zero = coefficients.dtype.type(0)
    size, experts = base.size, len(coefficients)
    summed = np.zeros(size, coefficients.dtype)
    divisor = np.zeros(size, coefficients.dtype)
    if agreeing:
        elected = np.zeros(size, coefficients.dtype)
        for k in range(experts):
            c, tau = coefficients[k], taus[k, :size]
            factor = c if weighted else one
            if count:
                for i in range(size):
                    vote = factor * tau[i]
                    elected[i] += (one if vote > 0 else zero) - (one if vote < 0 else zero)
            else:
                for i in range(size):
                    elected[i] += factor * tau[i]
        for k in range(experts):
            c, tau = coefficients[k], taus[k, :size]
            factor = c if weighted else one
            share = c if divide == 2 else one
            for i in range(size):
                vote = factor * tau[i]
                agrees = (vote > 0) if elected[i] >= 0 else (vote < 0)
                summed[i] += c * (tau[i] if agrees else zero)
                divisor[i] += share if agrees else zero
        if divide != 0:
            for i in range(size):
                summed[i] = summed[i] / (divisor[i] if divisor[i] != 0 else one)
    else:
        total = coefficients[0]
        for k in range(1, experts):
            total = total + coefficients[k]
        for k in range(experts):
            c, tau = coefficients[k], taus[k, :size]
            for i in range(size):
                summed[i] += c * tau[i]
        share = one * experts if divide == 1 else total
        if divide == 1 or (divide == 2 and abs(np.float64(total)) >= 1e-8):
            for i in range(size):
                summed[i] = summed[i] / share
    for i in range(size):
        store(out, i, load(base, i) + scale * summed[i])


@fused
def change(merged, original):
    """Return whether all is finite, the squared differences and the squared originals, summed.

    LANES sums side by side, each in order, so that the loop needs no order of its own.
    """
    moved = np.zeros(LANES, np.float64)
    size = np.zeros(LANES, np.float64)
    check = np.zeros(LANES, np.float64)
    for start in range(0, merged.size, LANES):
        new, old = merged[start : start + LANES], original[start : start + LANES]
        for i in range(new.size):
            x, y = load(new, i), load(old, i)
            step = np.float64(x) - np.float64(y)
            moved[i] += step * step
            size[i] += np.float64(y) * np.float64(y)
            check[i] += np.float64(x - x)  # stays 0, or becomes NaN at the first NaN or Inf
    return check.sum() == 0.0, moved.sum(), size.sum()


@inlined
def count_marks(marks):
    """Return how many of at most TILE marks are 1."""
    count = np.int32(0)
    for i in range(marks.size):
        count += marks[i]
    return count


@fused
def count_upper(base, expert, counts):
    """Add to counts [4, 2^15] by the upper bits of the task vector's keys; return those > 0.

    Four counters of each bucket: neighbours often fall into one and would wait for each other.
    """
    keys = np.empty(TILE, np.int32)
    marks = np.empty(TILE, np.uint8)
    zeros = 0
    for start in range(0, base.size, TILE):
        own, other = base[start : start + TILE], expert[start : start + TILE]
        for i in range(own.size):
            keys[i] = magnitude_key(load(other, i) - load(own, i))
        for i in range(own.size):
            marks[i] = keys[i] == 0
            keys[i] = keys[i] >> 16
        zeros += count_marks(marks[: own.size])
        last = own.size - own.size % 4
        for i in range(0, last, 4):
            for lane in range(4):
                counts[lane, keys[i + lane]] += 1
        for i in range(last, own.size):
            counts[0, keys[i]] += 1
    return base.size - zeros


@fused
def count_lower(base, expert, bucket, counts):
    """Add to counts [2^16] by the lower bits of the keys whose upper bits are `bucket`."""
    keys = np.empty(TILE, np.int32)
    found = np.empty(TILE, np.int32)
    for start in range(0, base.size, TILE):
        own, other = base[start : start + TILE], expert[start : start + TILE]
        for i in range(own.size):
            keys[i] = magnitude_key(load(other, i) - load(own, i))
        # the places are packed without a branch: which keys fall in the bucket cannot be guessed
        n = 0
        for i in range(own.size):
            found[n] = keys[i] & 0xFFFF
            n += keys[i] >> 16 == bucket
        for i in range(n):
            counts[found[i]] += 1


@fused
def count_ties(base, expert, cut):
    """Return how many keys equal `cut`."""
    # marked first and counted after: a sum inside the loop over floats was three times as slow
    found = 0
    wanted = np.int32(cut)
    hits = np.empty(TILE, np.uint8)
    for start in range(0, base.size, TILE):
        own, other = base[start : start + TILE], expert[start : start + TILE]
        for i in range(own.size):
            hits[i] = magnitude_key(load(other, i) - load(own, i)) == wanted
        found += count_marks(hits[: own.size])
    return found


@fused
def drop(base, expert, position, key, limit, divisor, out):
    """Put a task vector's entries into out where their random number is below `limit`, divided.

    position: of the first element in the whole tensor; key: of the random numbers; limit: of 2^24.
    """
    zero = divisor - divisor
    numbers = np.empty(TILE, np.int32)
    for start in range(0, base.size, TILE):
        own, other = base[start : start + TILE], expert[start : start + TILE]
        kept = out[start : start + TILE]
        # two loops, each of which is vectorised: one would not be
        for i in range(own.size):
            numbers[i] = np.int32(uniform(position + start + i + 1, key))
        for i in range(own.size):
            tau = load(other, i) - load(own, i)
            kept[i] = (tau if numbers[i] < limit else zero) / divisor


@fused
def ties(base, experts, cuts, ties_left, coefficients, options, scale, out):
    """Store the merge of trimmed task vectors; options are those of `combine`, in order."""
    taus = np.empty((len(experts), TILE), coefficients.dtype)
    agreeing, count, weighted, divide = options
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        own = base[start:stop]
        for k in range(len(experts)):
            ties_left[k] = trimmed(own, experts[k][start:stop], cuts[k], ties_left[k], taus[k])
        combine(taus, coefficients, agreeing, count, weighted, divide, scale, own, out[start:stop])


@fused
def dare(base, experts, position, keys, limits, divisors, coefficients, options, scale, out):
    """Store the merge of randomly thinned task vectors; options are those of `combine`."""
    taus = np.empty((len(experts), TILE), coefficients.dtype)
    agreeing, count, weighted, divide = options
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        own = base[start:stop]
        for k in range(len(experts)):
            drop(
                own, experts[k][start:stop], position + start, keys[k], limits[k], divisors[k],
                taus[k],
            )  # fmt: skip
        combine(taus, coefficients, agreeing, count, weighted, divide, scale, own, out[start:stop])


@fused
def products(first, second):
    """Return <x, x>, <x, y> and <y, y>, in float64, LANES sums side by side.

    The order of the sums is fixed but not that of the torch form; they agree to 1e-15 or so.
    """
    xx = np.zeros(LANES, np.float64)
    xy = np.zeros(LANES, np.float64)
    yy = np.zeros(LANES, np.float64)
    for start in range(0, first.size, LANES):
        one, two = first[start : start + LANES], second[start : start + LANES]
        for i in range(one.size):
            x, y = np.float64(load(one, i)), np.float64(load(two, i))
            xx[i] += x * x
            xy[i] += x * y
            yy[i] += y * y
    return xx.sum(), xy.sum(), yy.sum()
