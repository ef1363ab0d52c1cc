"""Inner products between the models' tensors, summed in float64 over fixed chunks.

Shapes: M models.
"""

from __future__ import annotations

from typing import Literal

import torch

from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import CHUNK, TensorGroup, Value


class InnerProducts(WeightStatistic):
    """All pairwise inner products <x_i, x_j> of one tensor, or of the whole model."""

    of: Literal["experts", "task_vectors"] = "task_vectors"
    """Between which vectors."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return this block's partial sums at the places of its chunks, [C, M, M]."""
        del done, index
        vectors = group.experts if self.of == "experts" else group.task_vectors
        flat = torch.stack([vector.flatten().to(torch.float64) for vector in vectors])
        chunks = -(-group.whole_numel // CHUNK)
        partial = torch.zeros(chunks, len(vectors), len(vectors), dtype=torch.float64)
        for start in range(0, flat.shape[1], CHUNK):
            part = flat[:, start : start + CHUNK]
            for i, left in enumerate(part):
                # one row at a time: a matrix product may sum in another order on other machines
                partial[(group.offset + start) // CHUNK, i] = (part * left).sum(1)
        return {f"{group.name}:products": partial}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `products` [M, M], in float64."""
        del numel
        names = [f"{name}:products"] if self.scope == "tensor" else sorted(done)
        parts = torch.stack([done[key].sum(0) for key in names])
        return {"products": parts.sum(0)}
