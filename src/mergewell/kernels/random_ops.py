"""Compiled loops of methods that drop entries at random.

They round as the torch forms do; see `ops`. Shapes: K experts, n elements of a block.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np

from mergewell.kernels import four_ops, ops
from mergewell.kernels.ops import (
    LANES,
    ask_for,
    compare,
    fold,
    fused,
    load,
    part_of,
    tallied,
    watch,
)
from mergewell.kernels.sparse_ops import TILE, combine, even

STEP = 1024
"""Elements at a time; their random numbers, too, stay in the first cache."""


@fused
def steps_of(size):
    """Return what SplitMix64 adds to a key for `size` pairs of positions, [size] int64."""
    steps = np.empty(size, np.int64)
    for i in range(size):
        steps[i] = i * np.int64(-7046029254386353131)
    return steps


@fused
def draw(position, key, size, steps, pairs):
    """Put 64-bit random integers for `size` positions under a key into pairs; see TensorGroup.

    Each serves two positions: `of_pairs` tells them. steps: those of `steps_of`.
    """
    first = ((position >> 1) + 1) * np.int64(-7046029254386353131) + key
    for i in range((size + (position & 1) + 1) >> 1):
        z = first + steps[i]
        z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * np.int64(-4658895280553007687)
        z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * np.int64(-7723592293110705685)
        pairs[i] = z ^ ((z >> 31) & 0x1FFFFFFFF)


@fused
def of_pairs(pairs, position, size):
    """Return the random numbers of `size` positions, uint32; the upper 24 bits count."""
    odd = position & 1
    return pairs.view(np.uint32)[odd : odd + size]


@fused
def dropped(base, expert, numbers, limit, factor, out):
    """Put a task vector's entries into out where their number is below `limit`, times `factor`."""
    zero, below = out.dtype.type(0), np.int32(limit)
    for i in range(base.size):
        tau = load(expert, i) - load(base, i)
        out[i] = (tau if np.int32(numbers[i] >> np.uint32(8)) < below else zero) * factor


@fused
def drop_and_combine(
    base, experts, position, keys, limits, factors, coefficients, options, scale, out
) -> Any:
    """Store the merge of randomly thinned task vectors; return the tally.

    position: of the first element in the whole tensor; keys, limits (of 2^24), factors: [K].
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.zeros((2, LANES), coefficients.dtype)
    padded = even(coefficients)
    taus, scratch = np.zeros((len(padded), STEP), padded.dtype), np.empty((3, STEP), padded.dtype)
    rows = max(experts.size, four_ops.MOST)
    steps, pairs = steps_of(STEP // 2 + 1), np.zeros((rows, STEP // 2 + 1), np.int64)
    four, table = four_ops.four_of(experts, base), four_ops.factors(coefficients, options)
    below, grown = np.zeros(rows, np.int32), np.zeros(rows, coefficients.dtype)
    below[: experts.size], grown[: experts.size] = limits, factors
    for start in range(0, base.size, STEP):
        stop, place = min(start + STEP, base.size), position + start
        own, part = base[start:stop], out[start:stop]
        for first in range(start, stop, ops.STEP):
            ask_for(base.ctypes.data, first, base.size, base)
        for k in range(experts.size):
            for first in range(start, stop, ops.STEP):
                ask_for(experts[k], first, base.size, base)
            watch(part_of(experts, k, start, stop, base), marks[0])
            draw(place, keys[k], own.size, steps, pairs[k])
        if four_ops.covers(options):
            numbers = (
                of_pairs(pairs[0], place, own.size), of_pairs(pairs[1], place, own.size),
                of_pairs(pairs[2], place, own.size), of_pairs(pairs[3], place, own.size),
            )  # fmt: skip
            four_ops.drop_and_elect(
                base, four, start, stop, numbers, below, grown, table, scale, out
            )
        else:
            for k in range(experts.size):
                expert = part_of(experts, k, start, stop, base)
                drawn = of_pairs(pairs[k], place, own.size)
                dropped(own, expert, drawn, limits[k], factors[k], taus[k])
            combine(taus, padded, options, scale, own, part, scratch)
        compare(part, own, marks, lanes)
        if stop % TILE == 0:
            fold(lanes, sums)
    fold(lanes, sums)
    return tallied(marks, sums)


@fused
def kept_sizes(base, experts, position, keys, limits, chunk, like, sums):
    """Put the L1 norms over each chunk into sums: of task vectors and of what is drawn of them.

    sums: float64 [n / chunk, 2 K], the whole ones first; position, keys, limits: see
    `drop_and_combine`; like: an array of the dtype to compute in.
    """
    steps, pairs = steps_of(STEP // 2 + 1), np.zeros(STEP // 2 + 1, np.int64)
    sizes, wide = np.empty(STEP, like.dtype), np.zeros((2, LANES), np.float64)
    whole, kept, count = wide[0], wide[1], experts.size
    for begin in range(0, base.size, chunk):
        end = min(begin + chunk, base.size)
        for k in range(count):
            below = np.int32(limits[k])
            wide[:] = 0
            for start in range(begin, end, STEP):
                stop = min(start + STEP, end)
                own, expert = base[start:stop], part_of(experts, k, start, stop, base)
                draw(position + start, keys[k], own.size, steps, pairs)
                numbers = of_pairs(pairs, position + start, own.size)
                for i in range(own.size):
                    sizes[i] = abs(load(expert, i) - load(own, i))
                for first in range(0, own.size, LANES):
                    size, number = sizes[first : min(first + LANES, own.size)], numbers[first:]
                    for i in range(size.size):
                        taken = np.int32(number[i] >> np.uint32(8)) < below
                        whole[i] += np.float64(size[i])
                        kept[i] += np.float64(size[i]) if taken else np.float64(0)
            sums[begin // chunk, k] = whole.sum()
            sums[begin // chunk, count + k] = kept.sum()
