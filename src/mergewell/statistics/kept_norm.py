"""L1 norms of task vectors, whole and after random drops.

Shapes: K experts.
"""

from __future__ import annotations

import torch

from mergewell.component import Fractions, for_each
from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import CHUNK, TensorGroup, Value


class KeptNorm(WeightStatistic):
    """The L1 norm of each task vector, and of the entries that a random drop would keep."""

    density: Fractions
    """Probability with which an entry is kept."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return this block's sums at the places of its chunks, [C, K, 2]."""
        del done, index
        chunks = -(-group.whole_numel // CHUNK)
        sums = torch.zeros(chunks, len(group.experts), 2, dtype=torch.float64)
        densities = for_each(self.density, len(group.experts))
        for expert, tau in enumerate(group.task_vectors):
            size = tau.flatten().abs().to(torch.float64)
            kept = torch.where(group.uniform(expert).flatten() < densities[expert], size, 0.0)
            for start in range(0, size.numel(), CHUNK):
                chunk = (group.offset + start) // CHUNK
                sums[chunk, expert, 0] = size[start : start + CHUNK].sum()
                sums[chunk, expert, 1] = kept[start : start + CHUNK].sum()
        return {f"{group.name}:sums": sums}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `whole` and `kept`, [K] each, float64."""
        del numel
        sums = done[f"{name}:sums"].sum(0)
        return {"whole": sums[:, 0], "kept": sums[:, 1]}
