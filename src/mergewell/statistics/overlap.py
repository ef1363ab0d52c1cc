"""How many entries an expert changed alone, and how many others changed as well.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mergewell.statistics.base import State, WeightStatistic
from mergewell.tensor_group import TensorGroup, Value


def changed(task_vectors: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], Tensor]:
    """Return K masks of |tau| > epsilon and, entry by entry, how many experts changed it."""
    masks = [tau.abs() > epsilon for tau in task_vectors]
    count = torch.zeros_like(task_vectors[0], dtype=torch.int32)
    for mask in masks:
        count = count + mask
    return masks, count


class Overlap(WeightStatistic):
    """For each expert, how many of its changed entries are its own and how many are shared."""

    epsilon: Annotated[float, Field(ge=0)]
    """Magnitude above which an entry counts as changed, in units of the weights."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return one block's counts, [K, 2]: own, shared."""
        del done, index
        masks, count = changed(group.task_vectors, self.epsilon)
        counts = [[(mask & (count == 1)).sum(), (mask & (count > 1)).sum()] for mask in masks]
        return {f"{group.name}:counts": torch.tensor(counts)}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `own` and `shared`, [K] int64 each, of the tensor or the whole model."""
        del numel
        keys = [f"{name}:counts"] if self.scope == "tensor" else sorted(done)
        counts = torch.stack([done[key] for key in keys]).sum(0)
        return {"own": counts[:, 0], "shared": counts[:, 1]}
