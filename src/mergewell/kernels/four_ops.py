"""Compiled loops over up to four experts at once: what they share never leaves the registers.

Loops over any number of experts, in `sparse_ops`, keep thinned task vectors in the first cache and
take twice as long. Fewer than four are filled up by the base itself, whose task vector is 0, with
the coefficient 0. They round as the torch forms do; see `ops`.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np

from mergewell.kernels.ops import fused, inlined, load, magnitude_key, part_of, store

MOST = 4
"""Experts at once."""


@fused
def covers(options):
    """Return whether a combination is one of these; options: those of `sparse_ops.combine`."""
    agreeing, count, _, _, experts = options
    return agreeing and not count and experts <= MOST


@fused
def four_of(experts, base):
    """Return four addresses, those of the experts and then the base's."""
    full = np.full(MOST, base.ctypes.data, np.int64)
    full[: experts.size] = experts[:MOST]
    return full


@fused
def factors(coefficients, options):
    """Return votes, coefficients and shares of the divisor, [3, 4]; options as in `covers`."""
    _, _, weighted, divide, experts = options
    table = np.zeros((3, MOST), coefficients.dtype)
    for k in range(min(experts, MOST)):
        table[0, k] = coefficients[k] if weighted else 1
        table[1, k] = coefficients[k]
        table[2, k] = coefficients[k] if divide == 2 else divide
    return table


@inlined
def row_of(table, row):
    """Return a row of a table of factors as four numbers."""
    return table[row, 0], table[row, 1], table[row, 2], table[row, 3]


@inlined
def elected(taus, votes, coefficients, shares, one, zero):
    """Return the sum of what agrees with the sign that has most mass, divided by its shares."""
    w, x, y, z = taus
    a, b, c, d = votes[0] * w, votes[1] * x, votes[2] * y, votes[3] * z
    up = one if a + b + c + d >= 0 else -one
    first, second, third, fourth = a * up > 0, b * up > 0, c * up > 0, d * up > 0
    summed = zero + coefficients[0] * w if first else zero
    summed = summed + coefficients[1] * x if second else summed
    summed = summed + coefficients[2] * y if third else summed
    summed = summed + coefficients[3] * z if fourth else summed
    divisor = shares[0] if first else zero
    divisor = divisor + shares[1] if second else divisor
    divisor = divisor + shares[2] if third else divisor
    divisor = divisor + shares[3] if fourth else divisor
    return summed / (divisor if divisor != 0 else one)


@inlined
def between(value, low, high, zero):
    """Return a value whose key is in [low, high), or else 0."""
    return value if np.uint32(magnitude_key(value) - low) < np.uint32(high - low) else zero


@fused
def trim_and_elect(base, experts, start, stop, bounds, table, scale, out):
    """Store the merge of elements [start, stop), of each task vector those that bounds keep.

    experts: [4]; bounds: int32 [2, 4 or more], the keys from which entries are passed over, and
    those from which they are kept; table: [3, 4], see `factors`.
    """
    own, part = base[start:stop], out[start:stop]
    one, zero = table.dtype.type(1), table.dtype.type(0)
    votes, coefficients, shares = row_of(table, 0), row_of(table, 1), row_of(table, 2)
    first, second = part_of(experts, 0, start, stop, base), part_of(experts, 1, start, stop, base)
    third, fourth = part_of(experts, 2, start, stop, base), part_of(experts, 3, start, stop, base)
    e, f, g, h = row_of(bounds, 1)
    p, q, r, s = row_of(bounds, 0)
    for i in range(own.size):
        origin = load(own, i)
        w = between(load(first, i) - origin, e, p, zero)
        x = between(load(second, i) - origin, f, q, zero)
        y = between(load(third, i) - origin, g, r, zero)
        z = between(load(fourth, i) - origin, h, s, zero)
        mean = elected((w, x, y, z), votes, coefficients, shares, one, zero)
        store(part, i, origin + scale * mean)


@inlined
def drawn(value, number, below, factor, zero):
    """Return a value whose random number's upper 24 bits are below a limit times `factor`, or 0."""
    return value * factor if np.int32(number >> np.uint32(8)) < below else zero


@fused
def drop_and_elect(base, experts, start, stop, numbers, limits, factors, table, scale, out):
    """Store the merge of elements [start, stop), of each task vector those that were drawn.

    experts: [4]; numbers: four of random_ops.of_pairs; limits, factors: [4 or more], of an expert;
    table: [3, 4], see `factors`.
    """
    own, part = base[start:stop], out[start:stop]
    one, zero = table.dtype.type(1), table.dtype.type(0)
    votes, coefficients, shares = row_of(table, 0), row_of(table, 1), row_of(table, 2)
    first, second = part_of(experts, 0, start, stop, base), part_of(experts, 1, start, stop, base)
    third, fourth = part_of(experts, 2, start, stop, base), part_of(experts, 3, start, stop, base)
    r, s, t, u = numbers
    e, f, g, h = limits[0], limits[1], limits[2], limits[3]
    a, b, c, d = factors[0], factors[1], factors[2], factors[3]
    for i in range(own.size):
        origin = load(own, i)
        w = drawn(load(first, i) - origin, r[i], e, a, zero)
        x = drawn(load(second, i) - origin, s[i], f, b, zero)
        y = drawn(load(third, i) - origin, t[i], g, c, zero)
        z = drawn(load(fourth, i) - origin, u[i], h, d, zero)
        mean = elected((w, x, y, z), votes, coefficients, shares, one, zero)
        store(part, i, origin + scale * mean)


@fused
def elect(base, taus, start, table, scale, out):
    """Store the merge of thinned task vectors, whose elements for base and out begin at `start`.

    taus: [4 or more, more than start + n], 0 where missing; table: [3, 4], see `factors`.
    """
    one, zero, stop = table.dtype.type(1), table.dtype.type(0), start + base.size
    votes, coefficients, shares = row_of(table, 0), row_of(table, 1), row_of(table, 2)
    first, second = taus[0, start:stop], taus[1, start:stop]
    third, fourth = taus[2, start:stop], taus[3, start:stop]
    for i in range(base.size):
        group = (first[i], second[i], third[i], fourth[i])
        mean = elected(group, votes, coefficients, shares, one, zero)
        store(out, i, load(base, i) + scale * mean)


@inlined
def spread(taus, size, zero):
    """Return the key of the population variance of the first `size` of four values.

    As `statistics.selected_energy.variance` does it: those that are missing are 0.
    """
    w, x, y, z = taus
    mean = (w + x + y + z) / size
    summed = (w - mean) * (w - mean)
    summed = summed + ((x - mean) * (x - mean) if size > 1 else zero)
    summed = summed + ((y - mean) * (y - mean) if size > 2 else zero)
    summed = summed + ((z - mean) * (z - mean) if size > 3 else zero)
    return magnitude_key(summed / size)


@fused
def spreads(base, experts, start, stop, count, like, keys):
    """Put the keys of the variance over `count` experts of elements [start, stop) into keys."""
    own, zero, size = base[start:stop], like.dtype.type(0), like.dtype.type(count)
    first, second = part_of(experts, 0, start, stop, base), part_of(experts, 1, start, stop, base)
    third, fourth = part_of(experts, 2, start, stop, base), part_of(experts, 3, start, stop, base)
    for i in range(own.size):
        origin = load(own, i)
        w, x = load(first, i) - origin, load(second, i) - origin
        y, z = load(third, i) - origin, load(fourth, i) - origin
        keys[i] = spread((w, x, y, z), size, zero)


@fused
def selected_squares(base, experts, start, stop, low, count, like, lanes):
    """Put the sums of squares of what `select_and_elect` takes into lanes [4, m], float64.

    Each lane sums every m-th element.
    """
    zero, size, least = like.dtype.type(0), like.dtype.type(count), np.int32(low)
    lanes[:] = 0
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    for begin in range(start, stop, lanes.shape[1]):
        end = min(begin + lanes.shape[1], stop)
        own = base[begin:end]
        first, second = part_of(experts, 0, begin, end, base), part_of(experts, 1, begin, end, base)
        third, fourth = part_of(experts, 2, begin, end, base), part_of(experts, 3, begin, end, base)
        for i in range(own.size):
            origin = load(own, i)
            w, x = load(first, i) - origin, load(second, i) - origin
            y, z = load(third, i) - origin, load(fourth, i) - origin
            taken = spread((w, x, y, z), size, zero) >= least
            a[i] += np.float64(w * w if taken else zero)
            b[i] += np.float64(x * x if taken else zero)
            c[i] += np.float64(y * y if taken else zero)
            d[i] += np.float64(z * z if taken else zero)


@fused
def select_and_elect(base, experts, start, stop, low, count, table, scale, out):
    """Store the merge of elements [start, stop), of those whose variance reaches the key `low`.

    experts: [4], of which `count` are there; table: [3, 4], see `factors`.
    """
    own, part = base[start:stop], out[start:stop]
    one, zero, size = table.dtype.type(1), table.dtype.type(0), table.dtype.type(count)
    least = np.int32(low)
    votes, coefficients, shares = row_of(table, 0), row_of(table, 1), row_of(table, 2)
    first, second = part_of(experts, 0, start, stop, base), part_of(experts, 1, start, stop, base)
    third, fourth = part_of(experts, 2, start, stop, base), part_of(experts, 3, start, stop, base)
    for i in range(own.size):
        origin = load(own, i)
        w, x = load(first, i) - origin, load(second, i) - origin
        y, z = load(third, i) - origin, load(fourth, i) - origin
        taken = spread((w, x, y, z), size, zero) >= least
        mean = elected((w, x, y, z), votes, coefficients, shares, one, zero)
        store(part, i, origin + scale * (mean if taken else zero))


@fused
def sums_of(lanes, sums):
    """Add the sum of each of four lanes to the first entries of sums; lanes: [4, m], float64.

    Each is added up in its order; side by side, since a sum waits for the one before it.
    """
    totals = np.zeros(MOST, np.float64)
    a, b, c, d = 0.0, 0.0, 0.0, 0.0
    for i in range(lanes.shape[1]):
        a, b, c, d = a + lanes[0, i], b + lanes[1, i], c + lanes[2, i], d + lanes[3, i]
    totals[0], totals[1], totals[2], totals[3] = a, b, c, d
    for k in range(sums.size):
        sums[k] += totals[k]
