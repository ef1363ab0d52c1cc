"""Compiled loops of methods that thin task vectors out: trim, drop, elect, combine.

They round as the torch forms do; see `ops`. Shapes: K experts, n elements of a tile.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np

from mergewell.kernels import four_ops
from mergewell.kernels.ops import (
    LANES,
    STEP,
    ask_for_all,
    compare,
    fold,
    fused,
    inlined,
    load,
    magnitude_key,
    part_of,
    store,
    tallied,
    watch,
)

TILE = 2048
"""Elements at a time: the thinned tiles of a few experts stay in the first cache."""

NONE_ABOVE = 0x7FFFFFFF
"""A key that no number has."""


@inlined
def lowest(cut, left):
    """Return the key from which entries are taken, of those at `cut` all (left < 0) or none (0)."""
    return min(np.int64(cut) + (left == 0), NONE_ABOVE)


@fused
def bound(keys, cut, left, lanes):
    """Return the key from which entries of a tile are taken, and how many ties are left after.

    Entries above `cut` are taken, and of those at it the first `left` (a negative number: all).
    The bound is -1 where only some ties of this very tile are taken: look at each entry then.
    lanes: int32 [LANES], scratch.
    """
    if left <= 0:
        return lowest(cut, left), left
    wanted = np.int32(cut)
    lanes[:] = 0
    for start in range(0, keys.size, LANES):
        part = keys[start : start + LANES]
        for i in range(part.size):
            lanes[i] += np.int32(part[i] == wanted)
    found = lanes.sum()
    return (np.int64(cut), left - found) if found <= left else (-1, left)


@fused
def trimmed(base, expert, cuts, left, out, keys, lanes):
    """Put the entries of a task vector between two cuts into out, 0 elsewhere.

    cuts: [2], the keys above which entries are passed over, and down to which they are kept;
    left: [2], how many entries at each key are passed over or kept from here on (negative: all),
    changed in place. keys: scratch of the tile's size.
    """
    zero = out.dtype.type(0)
    if left[0] > 0 or left[1] > 0:
        for i in range(base.size):
            keys[i] = magnitude_key(load(expert, i) - load(base, i))
    upper, upper_left = bound(keys[: base.size], cuts[0], left[0], lanes)
    lower, lower_left = bound(keys[: base.size], cuts[1], left[1], lanes)
    if upper >= 0 and lower >= 0:
        left[0], left[1] = upper_left, lower_left
        low, high = np.int32(lower), np.int32(upper)
        for i in range(base.size):
            tau = load(expert, i) - load(base, i)
            key = magnitude_key(tau)
            out[i] = tau if (key >= low) & (key < high) else zero
        return
    for i in range(base.size):
        taken = np.zeros(2, np.bool_)
        for side in range(2):
            tied = keys[i] == cuts[side]
            taken[side] = keys[i] > cuts[side] or (tied and left[side] != 0)
            if tied and left[side] > 0:
                left[side] -= 1
        tau = load(expert, i) - load(base, i)
        out[i] = tau if taken[1] and not taken[0] else zero


@fused
def combine(taus, coefficients, options, scale, base, out, scratch):
    """Store base + scale * the combination of thinned task vectors.

    taus: [K, TILE] with K even: a missing one is all 0 and has the coefficient 0. options:
    agreeing: elect signs and keep what agrees, else add up; count: elect by count, else by mass;
    weighted: votes times coefficients; divide: 0 not at all, 1 by how many (agree), 2 by
    coefficients; experts: how many there are. base, out: [n]; scratch: [3, TILE].
    """
    agreeing, count, weighted, divide, experts = options
    one, zero = coefficients.dtype.type(1), coefficients.dtype.type(0)
    size = base.size
    sign, summed, divisor = scratch[0, :size], scratch[1, :size], scratch[2, :size]
    for i in range(size):
        summed[i] = zero
    if agreeing:
        for i in range(size):
            sign[i] = zero
            divisor[i] = zero
        for k in range(0, len(coefficients), 2):
            left, right = taus[k, :size], taus[k + 1, :size]
            f, g = (coefficients[k], coefficients[k + 1]) if weighted else (one, one)
            if count:
                for i in range(size):
                    x, y = f * left[i], g * right[i]
                    sign[i] += (one if x > 0 else zero) - (one if x < 0 else zero)
                    sign[i] += (one if y > 0 else zero) - (one if y < 0 else zero)
            else:
                for i in range(size):
                    sign[i] = sign[i] + f * left[i] + g * right[i]
        for i in range(size):
            sign[i] = one if sign[i] >= 0 else -one
        for k in range(0, len(coefficients), 2):
            left, right = taus[k, :size], taus[k + 1, :size]
            c, d = coefficients[k], coefficients[k + 1]
            f, g = (c, d) if weighted else (one, one)
            p, q = (c, d) if divide == 2 else (one, one)
            for i in range(size):
                x, y, up = left[i], right[i], sign[i]
                first, second = f * x * up > 0, g * y * up > 0
                summed[i] = summed[i] + c * (x if first else zero) + d * (y if second else zero)
                divisor[i] = divisor[i] + (p if first else zero) + (q if second else zero)
        if divide != 0:
            for i in range(size):
                mean = summed[i] / (divisor[i] if divisor[i] != 0 else one)
                store(out, i, load(base, i) + scale * mean)
            return
    else:
        total = coefficients[0]
        for k in range(1, experts):
            total = total + coefficients[k]
        for k in range(0, len(coefficients), 2):
            left, right = taus[k, :size], taus[k + 1, :size]
            c, d = coefficients[k], coefficients[k + 1]
            for i in range(size):
                summed[i] = summed[i] + c * left[i] + d * right[i]
        share = one * experts if divide == 1 else total
        if divide == 1 or (divide == 2 and abs(np.float64(total)) >= 1e-8):
            for i in range(size):
                summed[i] = summed[i] / share
    for i in range(size):
        store(out, i, load(base, i) + scale * summed[i])


@fused
def even(coefficients):
    """Return the coefficients with a 0 behind them where their number is odd."""
    padded = np.zeros(len(coefficients) + len(coefficients) % 2, coefficients.dtype)
    padded[: len(coefficients)] = coefficients
    return padded


@fused
def trim_and_combine(base, experts, cuts, ties, chunk, coefficients, options, scale, out) -> Any:
    """Store the merge of trimmed task vectors; return the tally.

    cuts: [K, 2], see `trimmed`; ties: [K, 2, n / chunk + 1], how many entries at each key may be
    taken from a chunk on (negative: all), and after the last. options: those of `combine`.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), coefficients.dtype)
    padded = even(coefficients)
    taus, scratch = np.zeros((len(padded), TILE), padded.dtype), np.empty((3, TILE), padded.dtype)
    keys, found = np.empty(TILE, np.int32), np.empty(LANES, np.int32)
    left = np.empty((experts.size, 2), np.int64)
    four, table = four_ops.four_of(experts, base), four_ops.factors(coefficients, options)
    bounds = np.zeros((2, max(experts.size, four_ops.MOST)), np.int32)
    for start in range(0, base.size, TILE):
        for k in range(experts.size):
            for side in range(2):
                if start % chunk == 0:
                    left[k, side] = of_chunk(ties[k, side], start // chunk)
                bounds[side, k] = lowest(cuts[k, side], left[k, side])
        stop = min(start + TILE, base.size)
        few = left.max() <= 0 and four_ops.covers(options)
        for first in range(start, stop, STEP):
            last = min(first + STEP, stop)
            ask_for_all(base, experts, first)
            for k in range(experts.size):
                watch(part_of(experts, k, first, last, base), marks[0])
            if few:
                four_ops.trim_and_elect(base, four, first, last, bounds, table, scale, out)
                compare(out[first:last], base[first:last], marks, lanes)
        if not few:
            own, part = base[start:stop], out[start:stop]
            for k in range(experts.size):
                expert = part_of(experts, k, start, stop, base)
                trimmed(own, expert, cuts[k], left[k], taus[k], keys, found)
            combine(taus, padded, options, scale, own, part, scratch)
            compare(part, own, marks, lanes)
        fold(lanes, sums)
    return tallied(marks, sums)


@inlined
def of_chunk(ties, place):
    """Return how many ties a chunk takes: all (-1) where they do not run out in it.

    Then, and where there are none left (0), nobody has to count them.
    """
    return -1 if ties[place + 1] > 0 else ties[place]


@fused
def selected(base, experts, start, stop, cut, left, taus, keys, scratch, hits, ties):
    """Put the entries of large variance in [start, stop) into taus; return the ties left after.

    An entry is selected for all experts or for none; a cut of 0 with left < 0 selects all.
    """
    zero, size, own = taus.dtype.type(0), stop - start, base[start:stop]
    for k in range(experts.size):
        expert, tau = part_of(experts, k, start, stop, base), taus[k]
        for i in range(size):
            tau[i] = load(expert, i) - load(own, i)
    if cut == 0 and left < 0:
        return left
    mean, summed = scratch[0], scratch[1]
    count = mean.dtype.type(experts.size)
    for k in range(experts.size):
        tau = taus[k]
        for i in range(size):
            mean[i] = (mean[i] if k else zero) + tau[i]
    for i in range(size):
        mean[i] = mean[i] / count
        summed[i] = zero
    for k in range(experts.size):
        tau = taus[k]
        for i in range(size):
            summed[i] = summed[i] + (tau[i] - mean[i]) * (tau[i] - mean[i])
    for i in range(size):
        keys[i] = magnitude_key(summed[i] / count)
    lower, after = bound(keys[:size], cut, left, ties)
    if lower >= 0:
        low = np.int32(lower)
        for i in range(size):
            hits[i] = keys[i] >= low
    else:
        after = left
        for i in range(size):
            tied = keys[i] == cut
            hits[i] = keys[i] > cut or (tied and after > 0)
            after -= 1 if tied and after > 0 else 0
    for k in range(experts.size):
        tau = taus[k]
        for i in range(size):
            tau[i] = tau[i] if hits[i] else zero
    return after


@fused
def energies(base, experts, cut, ties, chunk, like, sums):
    """Add the selected task vectors' squares to sums [n / chunk, K], float64.

    cut, ties [n / chunk + 1]: see `trim_and_combine`.
    """
    taus, scratch = np.empty((experts.size, TILE), like.dtype), np.empty((2, TILE), like.dtype)
    keys, hits = np.empty(TILE, np.int32), np.empty(TILE, np.uint8)
    found, lanes = np.empty(LANES, np.int32), np.empty(LANES, np.float64)
    four, few = four_ops.four_of(experts, base), np.empty((four_ops.MOST, LANES), np.float64)
    left = np.int64(0)
    for start in range(0, base.size, TILE):
        place, stop = start // chunk, min(start + TILE, base.size)
        if start % chunk == 0:
            left = of_chunk(ties, place)
        if left <= 0 and experts.size <= four_ops.MOST:
            low = lowest(cut, left)
            four_ops.selected_squares(base, four, start, stop, low, experts.size, like, few)
            four_ops.sums_of(few, sums[place])
            continue
        left = selected(base, experts, start, stop, cut, left, taus, keys, scratch, hits, found)
        for k in range(experts.size):
            lanes[:] = 0
            for first in range(0, stop - start, LANES):
                tau = taus[k, first : min(first + LANES, stop - start)]
                for i in range(tau.size):
                    lanes[i] += np.float64(tau[i] * tau[i])
            sums[place, k] += lanes.sum()


@fused
def select_and_combine(base, experts, cut, ties, chunk, coefficients, scale, out) -> Any:
    """Store the merge of what is selected and agrees in sign; return the tally.

    cut, ties [n / chunk + 1]: see `trim_and_combine`.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), coefficients.dtype)
    padded, options = even(coefficients), (True, False, False, 2, experts.size)
    taus, scratch = np.zeros((len(padded), TILE), padded.dtype), np.empty((3, TILE), padded.dtype)
    keys, hits = np.empty(TILE, np.int32), np.empty(TILE, np.uint8)
    found, left = np.empty(LANES, np.int32), np.int64(0)
    four, table = four_ops.four_of(experts, base), four_ops.factors(coefficients, options)
    for start in range(0, base.size, TILE):
        place, stop = start // chunk, min(start + TILE, base.size)
        if start % chunk == 0:
            left = of_chunk(ties, place)
        few, low, count = left <= 0 and four_ops.covers(options), lowest(cut, left), experts.size
        for first in range(start, stop, STEP):
            last = min(first + STEP, stop)
            ask_for_all(base, experts, first)
            for k in range(count):
                watch(part_of(experts, k, first, last, base), marks[0])
            if few:
                four_ops.select_and_elect(base, four, first, last, low, count, table, scale, out)
                compare(out[first:last], base[first:last], marks, lanes)
        if not few:
            own, part = base[start:stop], out[start:stop]
            left = selected(base, experts, start, stop, cut, left, taus, keys, scratch, hits, found)
            combine(taus, padded, options, scale, own, part, scratch)
            compare(part, own, marks, lanes)
        fold(lanes, sums)
    return tallied(marks, sums)
