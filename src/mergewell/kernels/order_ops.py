"""Compiled loops of order statistics: sample scores, and count them around a guess.

Scores become keys, int32 that sort as the scores do: score k < K is the magnitude of the k-th task
vector, score K the variance over the experts. Shapes: K experts, n elements of a block.
"""
# Numba takes these functions apart itself; their types are those of their callers.
# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from mergewell.kernels.ops import LANES, TILE, count_marks, fused, load, magnitude_key, part_of

RUN = 32
"""Elements that are sampled together: what a line of the cache holds."""

BUCKETS = 2048
"""Counters on either side of the guess."""


@fused
def score(base, experts, which, start, stop, keys, scratch):
    """Put the keys of elements [start, stop) under score `which` into keys, at most TILE."""
    own, size = base[start:stop], stop - start
    if which < experts.size:
        expert = part_of(experts, which, start, stop, base)
        for i in range(size):
            keys[i] = magnitude_key(load(expert, i) - load(own, i))
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
def count(base, experts, scores, brackets, chunk, counts, tied, above, positive, like):
    """Count each score's keys around a guess, chunk by chunk.

    scores: [R], which score each row is about; brackets: int64 [R, 5], see `count_part`; counts:
    int64 [R, 2, 3, BUCKETS]; tied: int64 [R, n / chunk]; above, positive: [R], to be added to.
    """
    keys, marks = np.empty(TILE, np.int32), np.empty(TILE, np.uint8)
    scratch, lanes = np.empty((2, TILE), like.dtype), np.empty((3, LANES), np.int32)
    for begin in range(0, base.size, chunk):
        end = min(begin + chunk, base.size)
        for row in range(len(scores)):
            for start in range(begin, end, TILE):
                stop = min(start + TILE, end)
                score(base, experts, scores[row], start, stop, keys, scratch)
                part = keys[: stop - start]
                found = count_part(part, marks, lanes, brackets[row], counts[row])
                tied[row, begin // chunk] += found[0]
                above[row] += found[1]
                positive[row] += found[2]


@fused
def count_part(keys, marks, lanes, bracket, counts):
    """Return how many keys are at the guess, at or above top, and above 0; count the bracket.

    bracket: low, guess, top, and the shifts of its lower half [low, guess) and its upper half
    (guess, top). counts: int64 [2, 3, BUCKETS]: how many keys fall in each bucket of a half, their
    offsets in it, and these squared, summed. lanes: int32 [3, LANES], scratch.
    """
    low, guess, last = np.int32(bracket[0]), np.int32(bracket[1]), np.int32(bracket[2] - 1)
    size = keys.size
    lanes[:] = 0
    above, equal, zeros = lanes[0], lanes[1], lanes[2]
    for start in range(0, size, LANES):
        part, marked = keys[start : start + LANES], marks[start : start + LANES]
        for i in range(part.size):
            key = part[i]
            above[i] += np.int32(key > last)
            equal[i] += np.int32(key == guess)
            zeros[i] += np.int32(key == 0)
            marked[i] = (key >= low) & (key <= last) & (key != guess)
    for i in range(size, marks.size):
        marks[i] = 0
    # few keys are in the bracket: words of eight marks are passed over at once
    words = marks.view(np.uint64)
    for place in range(words.size):
        word = words[place]
        while word:
            i = 8 * place + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            half = 1 if keys[i] > guess else 0
            origin = np.int64(guess) + 1 if half else np.int64(low)
            distance, shift = np.int64(keys[i]) - origin, bracket[3 + half]
            bucket = distance >> shift
            offset = distance - (bucket << shift)
            counts[half, 0, bucket] += 1
            counts[half, 1, bucket] += offset
            counts[half, 2, bucket] += offset * offset
    return equal.sum(), above.sum(), size - zeros.sum()


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
