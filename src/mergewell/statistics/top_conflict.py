"""How often the largest entries of two task vectors point in opposite directions.

Shapes: K experts.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mergewell.component import Fractions, for_each
from mergewell.statistics.base import State
from mergewell.statistics.magnitude import MagnitudeThreshold, kept_count, magnitude_key
from mergewell.tensor_group import CHUNK, TensorGroup, Value

_WIDTH = 1 << 14
"""Entries of every task vector that are looked at together, to stay in the cache."""


class TopConflict(MagnitudeThreshold):
    """Of each pair's largest entries, how many have opposite signs, and how many were compared.

    An entry counts for a pair where it is among the `density` largest of *either* task vector and
    both are non-zero: a zero opposes nothing, and agrees with nothing. Entries that tie with the
    last one taken are all taken.

    Source: the trim and the signs of TIES, arXiv:2306.01708, section 3; methods.md C2.
    """

    cuts_ties: ClassVar[bool] = False
    passes: ClassVar[int] = 4

    density: Fractions = 0.2
    """Fraction of the entries that count as large, of all experts or of each."""

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether to read a tensor again: not where nothing moved, or no cut is above 0."""
        if index == 0 or self.scope == "model":
            return super().wanted(done, name, index)
        what = "bucket" if index == 1 else "moved"
        return super().wanted(done, name, index) and bool(done[f"{name}:0:{what}"].any())

    def advance(self, done: State, summed: State, index: int) -> State:
        """Return the state with thresholds found, and which tensors anybody moved."""
        positive = {k: counts for k, counts in summed.items() if k.endswith(":positive")}
        moved = {f"{k.removesuffix('positive')}moved": n.any() for k, n in positive.items()}
        return {**super().advance(done, summed, index), **moved}

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return one block's counts; in the last pass [2, K, K], opposed and compared entries."""
        if index < 3:
            return super().update(done, group, index)
        experts = len(group.task_vectors)
        cuts = self.found(done, group.name).get("key0", torch.zeros(experts, 1))[:, 0]
        counts = torch.zeros(2, experts, experts, dtype=torch.int64)
        taus = [tau.flatten() for tau in group.task_vectors]
        for start in range(0, taus[0].numel(), CHUNK):
            part = torch.stack([tau[start : start + CHUNK] for tau in taus])
            if not bool(part.any()):
                continue
            counts += _counted(part, magnitude_key(part) >= cuts[:, None])
        return {f"{group.name}:conflicts": counts}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `conflicts` [2, K, K] (opposed, compared) of the tensor, int64."""
        del numel
        if f"{name}:conflicts" in done:
            return {"conflicts": done[f"{name}:conflicts"]}
        experts = len(done[f"{name}:0:bucket"])  # nobody moved this tensor
        return {"conflicts": torch.zeros(2, experts, experts, dtype=torch.int64)}

    def of_whole(self, task_vectors: Tensor) -> Tensor:
        """Return `conflicts` of one tensor held in memory, [K, n] in float32; `scope` is ignored.

        The same counts as by passes, at a fraction of the time.
        """
        experts, size = task_vectors.shape
        conflicts = torch.zeros(2, experts, experts, dtype=torch.int64)
        if not size:
            return conflicts
        cuts = torch.empty(experts, 1)
        for row, density in enumerate(for_each(self.density, experts)):
            place = size - kept_count(density, size)
            magnitudes = task_vectors[row].abs().numpy()
            cuts[row] = float(np.partition(magnitudes, place)[place])
        for start in range(0, size, _WIDTH):
            part = task_vectors[:, start : start + _WIDTH]
            conflicts += _counted(part, part.abs() >= cuts)
        return conflicts


def _counted(part: Tensor, large: Tensor) -> Tensor:
    """Return opposed and compared entries of each pair, [2, K, K], given which are large, [K, n].

    Counts are products of signs; those below 2^24 are exact in float32. What is large in i or in j
    is large in i, and large in j, without what is in both.
    """
    signs = part.sign().float()
    top = signs * large
    signed, compared = (
        first + first.T - both
        for first, both in (
            (top @ signs.T, top @ top.T),
            (top.abs() @ signs.abs().T, top.abs() @ top.abs().T),
        )
    )
    return torch.stack([(compared - signed) / 2, compared]).to(torch.int64)
