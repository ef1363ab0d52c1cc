"""Compiled loops of methods that rank the entries of a row by magnitude.

Shapes: K experts, n elements of a row.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np

from mergewell.kernels.ops import (
    LANES,
    account,
    fused,
    load,
    magnitude_key,
    part_of,
    tallied,
    watch,
)
from mergewell.kernels.sparse_ops import TILE, combine, draw, even


@fused
def ranks(keys, counts, order, other, ranked):
    """Put the place of each key among the n, from 0 for the smallest, into ranked; ties in order.

    A radix sort of positions, digit by digit from the lowest; digits that all keys share are
    passed over. counts: int32, a power of two of them; order, other, ranked: int32 [n].
    """
    size, differ = keys.size, np.int32(0)
    for i in range(size):
        differ |= keys[i] ^ keys[0]
        order[i] = i
    bits = 0
    while (1 << bits) < counts.size:
        bits += 1
    mask = np.int32(counts.size - 1)
    for shift in range(0, 31, bits):
        if (differ >> shift) & mask == 0:
            continue
        counts[:] = 0
        for i in range(size):
            counts[(keys[i] >> shift) & mask] += 1
        total = np.int32(0)
        for digit in range(counts.size):
            held = counts[digit]
            counts[digit] = total
            total += held
        for i in range(size):
            entry = order[i]
            digit = (keys[entry] >> shift) & mask
            other[counts[digit]] = entry
            counts[digit] += 1
        for i in range(size):
            order[i] = other[i]
    for i in range(size):
        ranked[order[i]] = i


@fused
def drop_by_rank_and_combine(
    base, experts, row, position, random_keys, bounds, rescale, coefficients, options, scale, out
) -> Any:
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
    zero, half = np.float32(0), np.float32(0.5)
    thinned = np.zeros((len(padded), row), padded.dtype)
    taus = np.zeros((len(padded), TILE), padded.dtype)
    keys, other, order = np.empty((3, row), np.int32)
    ranked, numbers = np.empty((2, row), np.int32)
    counts, pairs = (
        np.empty(1 << (11 if row > 2048 else 8), np.int32),
        np.empty(row // 2 + 1, np.int64),
    )
    share, last = np.empty(row, padded.dtype), np.float32(max(row - 1, 1))
    for begin in range(0, base.size, row):
        own = base[begin : begin + row]
        for k in range(experts.size):
            expert, tau = part_of(experts, k, begin, begin + row, base), thinned[k]
            low, range_ = bounds[k, 0], bounds[k, 1]
            watch(expert, marks[0])
            if range_ == 0 and low == 1:
                for i in range(row):
                    tau[i] = load(expert, i) - load(own, i)
                continue
            for i in range(row):
                keys[i] = magnitude_key(load(expert, i) - load(own, i))
            ranks(keys, counts, order, other, ranked)
            draw(position + begin, random_keys[k], row, pairs, numbers)
            for i in range(row):
                part = np.float32(ranked[i]) / last if row > 1 else half
                share[i] = low + part * range_
            for i in range(row):
                number = np.float32(numbers[i]) / np.float32(1 << 24)
                kept = (load(expert, i) - load(own, i)) if number < share[i] else zero
                tau[i] = kept / share[i] if rescale else kept
        for start in range(0, row, TILE):
            stop = min(start + TILE, row)
            taus[:, : stop - start] = thinned[:, start:stop]
            part_out, part_own = out[begin + start : begin + stop], own[start:stop]
            combine(taus, padded, options, scale, part_own, part_out, scratch)
            account(part_out, part_own, marks, lanes, sums)
    return tallied(marks, sums)
