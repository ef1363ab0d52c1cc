"""Compiled loops of order statistics: sample scores, and count them around a guess.

Scores become keys, int32 that sort as the scores do: score k < K is the magnitude of the k-th task
vector, score K the variance over the experts. Shapes: K experts, n elements of a block.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from mergewell.kernels import four_ops
from mergewell.kernels.ops import TILE, count_marks, fused, load, magnitude_key, part_of

RUN = 32
"""Elements that are sampled together: what a line of the cache holds."""


@fused
def score(base, experts, which, start, stop, keys, scratch):
    """Put the keys of elements [start, stop) under score `which` into keys, at most TILE."""
    own, size = base[start:stop], stop - start
    if which < experts.size:
        expert = part_of(experts, which, start, stop, base)
        for i in range(size):
            keys[i] = magnitude_key(load(expert, i) - load(own, i))
        return
    if experts.size <= four_ops.MOST:
        four = four_ops.four_of(experts, base)
        four_ops.spreads(base, four, start, stop, experts.size, scratch, keys)
        return
    # as `statistics.selected_energy.variance` does it
    mean, summed = scratch[0], scratch[1]
    first = part_of(experts, 0, start, stop, base)
    for i in range(size):
        mean[i] = load(first, i) - load(own, i)
    for k in range(1, experts.size):
        expert = part_of(experts, k, start, stop, base)
        for i in range(size):
            mean[i] = mean[i] + (load(expert, i) - load(own, i))
    count = mean.dtype.type(experts.size)
    for i in range(size):
        mean[i] = mean[i] / count
        summed[i] = 0
    for k in range(experts.size):
        expert = part_of(experts, k, start, stop, base)
        for i in range(size):
            off = (load(expert, i) - load(own, i)) - mean[i]
            summed[i] = summed[i] + off * off
    for i in range(size):
        keys[i] = magnitude_key(summed[i] / count)


@fused
def sample(base, experts, scores, stride, like, keys):
    """Put the keys of a run of elements at every `stride`-th one into keys [scores, about n]."""
    scratch = np.empty((2, TILE), like.dtype)
    filled = 0
    for start in range(0, base.size, stride):
        stop = min(start + RUN, base.size)
        for row in range(len(scores)):
            part = keys[row, filled : filled + stop - start]
            score(base, experts, scores[row], start, stop, part, scratch)
        filled += stop - start
    return filled


@fused
def count(
    base, experts, scores, brackets, chunk, offset, tied, above, positive, held, filled, like
):
    """Count each score's keys around a guess, chunk by chunk, and hold the rest of the bracket.

    scores: [R], ascending, which score each row is about; brackets: int64 [R, 3], the guess lies
    in [low, top); offset: of the block in its tensor, [n / chunk] are its chunks. To be added to:
    tied: int64 [R, C], keys at the guess; above: [R], keys from top on; positive: [R], keys above
    0, of variances only. held: int32 [R, 2, room], key and chunk of those in the bracket beside the
    guess; filled: [R], how many there were, kept or not.
    """
    keys, marks = np.empty(TILE, np.int32), np.empty(TILE, np.uint8)
    scratch = np.empty((2, TILE), like.dtype)
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        place, part = (offset + start) // chunk, keys[: stop - start]
        for row in range(len(scores)):
            if row == 0 or scores[row] != scores[row - 1]:
                score(base, experts, scores[row], start, stop, keys, scratch)
            low, guess, top = brackets[row]
            found = above_and_at(part, top - 1, guess)
            above[row] += found[0]
            tied[row, place] += found[1]
            if scores[row] == experts.size:
                positive[row] += above_and_at(part, 0, 0)[0]
            if low < guess or top > guess + 1:
                filled[row] = hold(part, marks, low, guess, top, place, held[row], filled[row])


@fused
def above_and_at(keys, bound, guess):
    """Return how many keys are above a bound, and how many at the guess."""
    above, at, last, wanted = np.int32(0), np.int32(0), np.int32(bound), np.int32(guess)
    for i in range(keys.size):
        above = np.int32(above + np.int32(keys[i] > last))
        at = np.int32(at + np.int32(keys[i] == wanted))
    return above, at


@fused
def hold(keys, marks, low, guess, top, place, held, filled):
    """Append the keys in [low, top) other than the guess, with their chunk; return how many."""
    first, width, wanted = np.int32(low), np.uint32(top - low), np.int32(guess)
    for i in range(keys.size):
        marks[i] = (np.uint32(keys[i] - first) < width) & (keys[i] != wanted)
    for i in range(keys.size, marks.size):
        marks[i] = 0
    # few keys are in the bracket: words of eight marks are passed over at once
    words = marks.view(np.uint64)
    for number in range(words.size):
        word = words[number]
        while word:
            i = 8 * number + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            if filled < held.shape[1]:
                held[0, filled], held[1, filled] = keys[i], place
            filled += 1
    return filled


@fused
def histogram(base, experts, scores, upper, counts, like):
    """Count each score's keys by their upper 16 bits, or the lower ones of those that have `upper`.

    upper: int64 [R], -1 to count the upper bits; counts: int64 [R, 2^16], to be added to.
    """
    keys, scratch = np.empty(TILE, np.int32), np.empty((2, TILE), like.dtype)
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        for row in range(len(scores)):
            score(base, experts, scores[row], start, stop, keys, scratch)
            for i in range(stop - start):
                if upper[row] < 0:
                    counts[row, keys[i] >> 16] += 1
                elif keys[i] >> 16 == upper[row]:
                    counts[row, keys[i] & 0xFFFF] += 1


@fused
def count_ties(base, experts, scores, wanted, chunk, tied, like):
    """Add to tied [R, n / chunk] how many of each score's keys equal wanted [R]; -1 for none."""
    keys, marks = np.empty(TILE, np.int32), np.empty(TILE, np.uint8)
    scratch = np.empty((2, TILE), like.dtype)
    for start in range(0, base.size, TILE):
        stop = min(start + TILE, base.size)
        for row in range(len(scores)):
            if wanted[row] < 0:
                continue
            key = np.int32(wanted[row])
            score(base, experts, scores[row], start, stop, keys, scratch)
            for i in range(stop - start):
                marks[i] = keys[i] == key
            tied[row, start // chunk] += count_marks(marks[: stop - start])
