"""Sums of the task vectors' entries: what a correlation needs beside inner products.

Shapes: K experts.
"""

from __future__ import annotations

import torch

from mergewell.statistics.base import State, WeightStatistic
from mergewell.statistics.ops import chunk_sums
from mergewell.tensor_group import TensorGroup, Value


class Sums(WeightStatistic):
    """The sum of each task vector's entries, of one tensor or of the whole model."""

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return this block's sums at the places of its chunks, [C, K]."""
        del done, index
        return {f"{group.name}:sums": chunk_sums(group, group.task_vectors)}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `sums` [K], in float64."""
        del numel
        names = [f"{name}:sums"] if self.scope == "tensor" else sorted(done)
        return {"sums": torch.stack([done[key].sum(0) for key in names]).sum(0)}
