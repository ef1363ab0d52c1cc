"""How much of the task vectors' mass points against the rest.

Shapes: K experts.
"""

from __future__ import annotations

import torch

from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import CHUNK, TensorGroup, Value


class SignConflict(WeightStatistic):
    """The mass that cancels when task vectors are added, and each pair's opposed mass.

    conflict = 1 - sum |sum_k tau_k| / sum sum_k |tau_k|: 0 where all agree, 1 where all cancels.
    Of a pair: the share of sum |tau_i||tau_j| on entries of opposite sign.

    Source: the elected-sign disagreement of TIES (arXiv:2306.01708, section 3), weighted by mass.
    Departures: weighted by magnitude, so that the many tiny entries do not drown the large ones.
    """

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return this block's sums at the places of its chunks."""
        del done, index
        taus = [tau.flatten().to(torch.float64) for tau in group.task_vectors]
        experts = len(taus)
        chunks = -(-group.whole_numel // CHUNK)
        mass = torch.zeros(chunks, 2, dtype=torch.float64)
        pairs = torch.zeros(chunks, 2, experts, experts, dtype=torch.float64)
        for start in range(0, taus[0].numel(), CHUNK):
            chunk = (group.offset + start) // CHUNK
            parts = torch.stack([tau[start : start + CHUNK] for tau in taus])
            mass[chunk, 0] = parts.sum(0).abs().sum()
            mass[chunk, 1] = parts.abs().sum()
            for i in range(experts):
                products = parts * parts[i]
                pairs[chunk, 0, i] = products.clamp(max=0).abs().sum(1)
                pairs[chunk, 1, i] = products.abs().sum(1)
        return {f"{group.name}:mass": mass, f"{group.name}:pairs": pairs}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `mass` [2] (what remains, what there was) and `pairs` [2, K, K] (opposed, all)."""
        del numel
        return {"mass": done[f"{name}:mass"].sum(0), "pairs": done[f"{name}:pairs"].sum(0)}
