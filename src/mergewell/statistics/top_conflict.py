"""How often the largest entries of two task vectors point in opposite directions.

Shapes: K experts.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from mergewell.component import Fractions
from mergewell.statistics.base import State
from mergewell.statistics.magnitude import MagnitudeThreshold, magnitude_key
from mergewell.tensor_group import CHUNK, TensorGroup, Value


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
            large = (magnitude_key(part) >= cuts[:, None]).float()
            up, down = (part > 0).float(), (part < 0).float()
            either, changed = up + down, large * (up + down)
            # counts below 2^24 are exact in float32; large in i or j = in i + in j - in both
            first = (large * up) @ down.T + (large * down) @ up.T
            both = (large * up) @ (large * down).T + (large * down) @ (large * up).T
            any_sign = changed @ either.T
            counts[0] += (first + first.T - both).to(torch.int64)
            counts[1] += (any_sign + any_sign.T - changed @ changed.T).to(torch.int64)
        return {f"{group.name}:conflicts": counts}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `conflicts` [2, K, K] (opposed, compared) of the tensor, int64."""
        del numel
        if f"{name}:conflicts" in done:
            return {"conflicts": done[f"{name}:conflicts"]}
        experts = len(done[f"{name}:0:bucket"])  # nobody moved this tensor
        return {"conflicts": torch.zeros(2, experts, experts, dtype=torch.int64)}
