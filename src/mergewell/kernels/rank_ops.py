"""Compiled loops of methods that rank the entries of a row by magnitude.

Shapes: K experts, n elements of a row.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np

from mergewell.kernels.ops import LANES, account, fused, load, magnitude_key, tallied, watch
from mergewell.kernels.sparse_ops import TILE, combine, draw, even

_BINADES = 8
"""Powers of two below the largest magnitude that are told apart in buckets."""

_CROWD = 48
"""Entries of a bucket from which on it is sorted and not just put in order."""


@fused
def ranks(keys, starts, buckets, order, ranked):
    """Put the place of each key among the n, from 0 for the smallest, into ranked; ties in order.

    Keys are spread over buckets finer than their number where they are dense, then put in order.
    starts: int32, the buckets; buckets, order, ranked: int32 [n].
    """
    size, highest = keys.size, 0
    for i in range(size):
        highest = max(highest, keys[i])
    fine = 0
    while (2 * _BINADES << fine) < starts.size:
        fine += 1
    shift = 23 - fine
    floor = (highest >> shift) - starts.size + 2
    starts[:] = 0
    lowest = np.int32(max(floor, 0))
    for i in range(size):
        buckets[i] = max(np.int32(keys[i] >> shift) - lowest, 0) + 1
    for i in range(size):
        starts[buckets[i]] += 1
    total = 0
    crowded = False
    for i in range(starts.size):
        crowded |= starts[i] > _CROWD
        total += starts[i]
        starts[i] = total
    # starts[b + 1] is the end of bucket b; starts[b] its begin, which moves on as it fills
    for i in range(size):
        place = starts[buckets[i] - 1]
        order[place] = i
        starts[buckets[i] - 1] = place + 1
    if crowded:
        begin = 0
        while begin < size:
            end = begin + 1
            bucket = buckets[order[begin]]
            while end < size and buckets[order[end]] == bucket:
                end += 1
            if end - begin > _CROWD:
                held = order[begin:end].copy()
                order[begin:end] = held[np.argsort(keys[held], kind="mergesort")]
            begin = end
    for i in range(1, size):
        entry, place = order[i], i
        while place > 0 and keys[order[place - 1]] > keys[entry]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = entry
    for i in range(size):
        ranked[order[i]] = i


@fused
def drop_by_rank_and_combine(
    base, experts, row, position, random_keys, bounds, rescale, coefficients, options, scale, out
):
    """Store the merge of task vectors thinned row by row; return the tally.

    row: elements of a row; position: of the first element in the whole tensor; bounds: [K, 2], the
    probability to keep the smallest, and how much more the largest has; rescale: divide by it.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes, scratch = (
        np.empty((2, LANES), coefficients.dtype),
        np.empty((3, TILE), coefficients.dtype),
    )
    padded = even(coefficients)
    zero, half = padded.dtype.type(0), padded.dtype.type(0.5)
    thinned = np.zeros((len(padded), row), padded.dtype)
    taus = np.zeros((len(padded), TILE), padded.dtype)
    width = 2 * _BINADES
    while width < 4 * row and width < 1 << 15:
        width *= 2
    keys, buckets, order = np.empty((3, row), np.int32)
    ranked, numbers = np.empty((2, row), np.int32)
    starts, pairs = np.empty(width + 2, np.int32), np.empty(row // 2 + 1, np.int64)
    share, last = np.empty(row, padded.dtype), padded.dtype.type(max(row - 1, 1))
    for begin in range(0, base.size, row):
        own = base[begin : begin + row]
        for k in range(len(experts)):
            expert, tau = experts[k][begin : begin + row], thinned[k]
            low, range_ = bounds[k, 0], bounds[k, 1]
            watch(expert, marks[0])
            if range_ == 0 and low == 1:
                for i in range(row):
                    tau[i] = load(expert, i) - load(own, i)
                continue
            for i in range(row):
                keys[i] = magnitude_key(load(expert, i) - load(own, i))
            ranks(keys, starts, buckets, order, ranked)
            draw(position + begin, random_keys[k], row, pairs, numbers)
            for i in range(row):
                part = padded.dtype.type(ranked[i]) / last if row > 1 else half
                share[i] = low + part * range_
            for i in range(row):
                number = padded.dtype.type(numbers[i]) / padded.dtype.type(1 << 24)
                kept = (load(expert, i) - load(own, i)) if number < share[i] else zero
                tau[i] = kept / share[i] if rescale else kept
        for start in range(0, row, TILE):
            stop = min(start + TILE, row)
            taus[:, : stop - start] = thinned[:, start:stop]
            part_out, part_own = out[begin + start : begin + stop], own[start:stop]
            combine(taus, padded, options, scale, part_own, part_out, scratch)
            account(part_out, part_own, marks, lanes, sums)
    return tallied(marks, sums)
