"""Compiled loops of methods that rank the entries of a row by magnitude.

Shapes: K experts, n elements of a row.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

from typing import Any

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from mergewell.kernels import four_ops
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
from mergewell.kernels.random_ops import draw, of_pairs, steps_of
from mergewell.kernels.sparse_ops import TILE, combine, even

BINS = 4096
"""Counters of upper bits, two for each."""

ODD = 192
"""Entries of a row, at most, that are sorted by insertion."""


@fused
def by_rank(keys, table, out, spare):
    """Put table[r] into out for each key, r its place among the n, from 0 for the smallest.

    Equal keys are ranked in order. spare: int32 [4, n + BINS], scratch.
    """
    if not by_counting(keys, table, out, spare):
        by_sorting(keys, table, out, spare)


@fused
def by_counting(keys, table, out, spare):
    """Do as `by_rank` where most keys have no lower 16 bits; return whether it was done.

    So have most differences of two near bfloat16 numbers. Keys of the same upper bits are counted
    together if they have no lower ones, so all are equal, and apart from them those that have:
    these few are sorted. No key moves else.
    """
    size = keys.size
    most, least = np.int32(0), np.uint32(0xFFFFFFFF)  # of those that are not 0
    for i in range(size):
        most = max(most, keys[i])
        least = min(least, np.uint32(keys[i] - 1))
    origin = np.int32(((np.int64(least) + 1) >> 16) - 1) if most > 0 else np.int32(0)
    bins = 2 * (np.int64(most >> 16) - origin) + 2
    if bins > BINS or size >= 1 << 16:
        return False
    digits, marks = spare[0].view(np.uint16)[:size], spare[1].view(np.uint8)[: (bins + 7) & ~7]
    counts, odd = spare[2].view(np.uint32)[: marks.size], spare[3]
    for i in range(size):
        upper = max(np.int32((keys[i] >> 16) - origin), np.int32(0))
        digits[i] = 2 * upper + (((keys[i] & 0xFFFF) + 0xFFFF) >> 16)
    counts[:] = 0
    for i in range(size):
        counts[digits[i]] += np.uint32(1)
    for i in range(marks.size):
        marks[i] = counts[i] != 0
    total, lower, repeated = np.uint32(0), np.uint32(0), False
    words = marks.view(np.uint64)
    for number in range(words.size):
        word = words[number]
        while word:
            place = 8 * number + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            held = counts[place]
            counts[place] = total
            total += held
            if place & 1:
                lower += held
                repeated |= held > 1
    if repeated and lower > ODD:
        return False
    for i in range(size):
        rank = counts[digits[i]]
        counts[digits[i]] = np.uint32(rank + np.uint32(1))
        out[i] = table[rank]
    if repeated:
        marks = spare[1].view(np.uint8)[: (size + 7) & ~7]
        marks[size:] = 0
        for i in range(size):
            marks[i] = digits[i] & 1
        filled = sort_marked(keys, marks.view(np.uint64), odd)
        for place in range(filled - 1, -1, -1):
            digit = digits[odd[place]]  # of which `counts` now holds where it ends
            counts[digit] -= np.uint32(1)
            out[odd[place]] = table[counts[digit]]
    return True


@fused
def sort_marked(keys, words, order):
    """Put the positions of marked keys into order, by key and then as they come; return how many.

    words: eight marks of 0 or 1 each.
    """
    filled = 0
    for number in range(words.size):
        word = words[number]
        while word:
            i = 8 * number + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            place = filled
            while place > 0 and keys[order[place - 1]] > keys[i]:
                order[place] = order[place - 1]
                place -= 1
            order[place] = i
            filled += 1
    return filled


@fused
def by_sorting(keys, table, out, spare):
    """Do as `by_rank` by a radix sort of positions, digit by digit from the lowest.

    Digits that all keys share are passed over.
    """
    size, differ = keys.size, np.int32(0)
    order, other = spare[0, :size], spare[1, :size]
    bits = 11 if size > 2048 else 8
    counts = spare[2, : 1 << bits]
    for i in range(size):
        differ |= keys[i] ^ keys[0]
        order[i] = i
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
        out[order[i]] = table[i]


@fused
def probabilities(low, range_, row, like):
    """Return how probable it is to be kept, by rank in a row: from `low` up by `range_`."""
    table, last, half = np.empty(row, like.dtype), np.float32(max(row - 1, 1)), np.float32(0.5)
    for i in range(row):
        part = np.float32(i) / last if row > 1 else half
        table[i] = low + part * range_
    return table


@fused
def keep(base, expert, numbers, share, rescale, out):
    """Put into out what is kept of a task vector, with the probability `share`, and 0 else.

    numbers: random, of 32 bits, the upper 24 count; rescale: divide by the probability.
    """
    zero, one, unit = out.dtype.type(0), out.dtype.type(1), np.float32(1 / (1 << 24))
    for i in range(base.size):
        tau = load(expert, i) - load(base, i)
        kept = tau if np.float32(np.int32(numbers[i] >> np.uint32(8))) * unit < share[i] else zero
        # no share is 0, but a division that might fail would not be vectorised
        divisor = share[i] if rescale and share[i] != 0 else one
        out[i] = kept / divisor


@fused
def drop_by_rank_and_combine(
    base, experts, row, position, random_keys, bounds, rescale, coefficients, options, scale, out
) -> Any:
    """Store the merge of task vectors thinned row by row; return the tally.

    row: elements of a row; position: of the first element in the whole tensor; bounds: [K, 2], the
    probability to keep the smallest, and how much more the largest has; rescale: divide by it.
    """
    marks, sums = np.zeros((2, LANES), np.uint16), np.zeros((2, LANES), np.float64)
    lanes = np.empty((2, LANES), coefficients.dtype)
    padded = even(coefficients)
    rows = max(len(padded), four_ops.MOST)
    taus, scratch = np.zeros((len(padded), TILE), padded.dtype), np.empty((3, TILE), padded.dtype)
    thinned, share = np.zeros((rows, row), padded.dtype), np.empty(row, padded.dtype)
    keys, spare = np.empty(row, np.int32), np.empty((4, row + BINS), np.int32)
    steps, pairs = steps_of(row // 2 + 1), np.empty(row // 2 + 1, np.int64)
    tables = np.empty((experts.size, row), padded.dtype)
    for k in range(experts.size):
        tables[k] = probabilities(bounds[k, 0], bounds[k, 1], row, padded)
    factors = four_ops.factors(coefficients, options)
    for begin in range(0, base.size, row):
        place, own = position + begin, base[begin : begin + row]
        for k in range(experts.size):
            expert, tau = part_of(experts, k, begin, begin + row, base), thinned[k]
            watch(expert, marks[0])
            if bounds[k, 0] == 1 and bounds[k, 1] == 0:
                for i in range(row):
                    tau[i] = load(expert, i) - load(own, i)
                continue
            for i in range(row):
                keys[i] = magnitude_key(load(expert, i) - load(own, i))
            by_rank(keys, tables[k], share, spare)
            draw(place, random_keys[k], row, steps, pairs)
            keep(own, expert, of_pairs(pairs, place, row), share, rescale, tau)
        for start in range(0, row, TILE):
            stop = min(start + TILE, row)
            part_out, part_own = out[begin + start : begin + stop], own[start:stop]
            if four_ops.covers(options):
                four_ops.elect(part_own, thinned, start, factors, scale, part_out)
            else:
                taus[:, : stop - start] = thinned[: len(taus), start:stop]
                combine(taus, padded, options, scale, part_own, part_out, scratch)
            account(part_out, part_own, marks, lanes, sums)
    return tallied(marks, sums)
