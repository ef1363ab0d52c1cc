"""Compiled loops of what needs the inner products of task vectors.

Products are float64 and their sums run side by side: the order is fixed, whatever the blocks, but
it is not that of the torch form; they agree to 1e-15 or so. Shapes: K experts, P = K (K + 1) / 2
pairs (0, 0), (1, 0), (1, 1), (2, 0) ...; n elements.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np

from mergewell.kernels.ops import (
    LANES,
    STEP,
    TILE,
    ask_for,
    compare,
    fold,
    fused,
    load,
    part_of,
    store,
    tallied,
)


@fused
def pairs_of(experts):
    """Return how many pairs there are, each with itself included."""
    return experts.size * (experts.size + 1) // 2


@fused
def products(base, experts, start, stop, taus, lanes, out):
    """Put the inner products of task vectors over elements [start, stop) into out, [K, K].

    taus: [K, LANES], lanes: [P, LANES], float64, scratch.
    """
    lanes[:] = 0
    for begin in range(start, stop, LANES):
        end = min(begin + LANES, stop)
        own = base[begin:end]
        if (begin - start) % STEP == 0:
            ask_for(base.ctypes.data, begin, base.size, base)
            for k in range(experts.size):
                ask_for(experts[k], begin, base.size, base)
        pair = 0
        for k in range(experts.size):
            expert, tau = part_of(experts, k, begin, end, base), taus[k, : own.size]
            for i in range(own.size):
                tau[i] = np.float64(load(expert, i) - load(own, i))
            for other in range(k + 1):
                second, lane = taus[other, : own.size], lanes[pair]
                for i in range(own.size):
                    lane[i] += tau[i] * second[i]
                pair += 1
    pair = 0
    for k in range(experts.size):
        for other in range(k + 1):
            out[k, other] = halved(lanes[pair])
            out[other, k] = out[k, other]
            pair += 1


@fused
def halved(lane):
    """Return the sum of LANES numbers, by halves; changes them."""
    size = LANES // 2
    while size:
        lower, upper = lane[:size], lane[size : 2 * size]
        for i in range(size):
            lower[i] += upper[i]
        size //= 2
    return lane[0]


@fused
def chunk_products(base, experts, chunk, sums):
    """Put the inner products over each chunk into sums, [n / chunk, K, K]."""
    taus, lanes = np.empty((experts.size, LANES)), np.empty((pairs_of(experts), LANES))
    for start in range(0, base.size, chunk):
        stop = min(start + chunk, base.size)
        products(base, experts, start, stop, taus, lanes, sums[start // chunk])


@fused
def pull(inner):
    """Return the ratio t of `model_stock` for inner products [K, K] of task vectors."""
    count, summed = len(inner), 0.0
    if count == 1:
        return 1.0
    for i in range(count):
        for j in range(i + 1, count):
            norms = np.sqrt(inner[i, i] * inner[j, j])
            if norms != 0:
                summed += min(max(inner[i, j] / norms, -1.0), 1.0)
    cosine = summed / (count * (count - 1) // 2)
    below = 1 + (count - 1) * cosine
    return 0.0 if abs(below) < 1e-6 else count * cosine / below


@fused
def pull_rows(base, experts, row, like, out) -> Any:
    """Store the base plus the mean task vector times each row's own ratio; return the tally.

    row: elements of a row; like: an array of the dtype to compute in.
    What is not finite in an input is not finite in its row of the result.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes, tile = np.zeros((2, LANES), like.dtype), np.empty(STEP, like.dtype)
    taus, wide = np.empty((experts.size, LANES)), np.empty((pairs_of(experts), LANES))
    inner, told = np.empty((experts.size, experts.size)), 0
    one, zero = like.dtype.type(1), like.dtype.type(0)
    # never 0, but a division that might fail would not be vectorised
    count = like.dtype.type(max(experts.size, 1))
    for begin in range(0, base.size, row):
        end = min(begin + row, base.size)
        products(base, experts, begin, end, taus, wide, inner)
        ratio = like.dtype.type(pull(inner))
        for start in range(begin, end, STEP):
            stop = min(start + STEP, end)
            own, part = base[start:stop], out[start:stop]
            for k in range(experts.size):
                expert = part_of(experts, k, start, stop, base)
                for i in range(own.size):
                    tau = load(expert, i) - load(own, i)
                    tile[i] = (tile[i] if k else zero) + tau
            for i in range(own.size):
                mean = tile[i] / (count if count != 0 else one)
                store(part, i, load(own, i) + ratio * mean)
            compare(part, own, marks, lanes)
            told += own.size
            if told >= TILE:
                fold(lanes, sums)
                told = 0
    fold(lanes, sums)
    return tallied(marks, sums)
