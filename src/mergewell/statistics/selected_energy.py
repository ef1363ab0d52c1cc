"""Where experts differ most, and how much each of them changed there.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.component import Fraction
from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic, chunk_sums, reached, sort_key
from mergewell.tensor_group import TensorGroup, Value


def variance(task_vectors: Sequence[Tensor]) -> Tensor:
    """Return the population variance over the experts, entry by entry, summed in their order."""
    count = len(task_vectors)
    mean = task_vectors[0]
    for tau in task_vectors[1:]:
        mean = mean + tau
    mean = mean / count
    summed = torch.zeros_like(mean)
    for tau in task_vectors:
        summed = summed + (tau - mean) * (tau - mean)
    return summed / count


class SelectedEnergy(OrderStatistic):
    """The variance that the selected entries reach, and the experts' mean squares over these.

    Selected are the floor(density * m) entries of largest variance over the experts, of the m that
    vary at all; at density 1 all entries, without a threshold.

    Source: SCE, arXiv:2408.07990, section 3.2 (select and calculate).
    """

    passes: ClassVar[int] = 4

    density: Fraction
    """Fraction of the varying entries to select."""

    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        """Return the variance over the experts."""
        del stage, found
        return [variance(group.task_vectors)]

    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        """Return how many entries are selected, [1, 1]."""
        del stage, counts
        return torch.tensor([[int(self.density * int(positive[0]) + 1e-9)]])

    def mask(self, group: TensorGroup, value: Value) -> Tensor | None:
        """Return where entries of this block are selected; None selects all."""
        if self.density == 1.0:
            return None
        return reached(sort_key(variance(group.task_vectors)), value, 0, group.offset)

    def wanted(self, done: State, name: str, index: int) -> bool:
        """Return whether a tensor is read in this pass: only for its energy if all is selected."""
        if self.density == 1.0:
            return index == 3
        return super().wanted(done, name, index)

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return one block's counts or, in the last pass, its squares summed by chunk, [C, K]."""
        if index < 3:
            return super().update(done, group, index)
        mask = self.mask(group, self._threshold(done, group.name, group.whole_numel))
        squares = [tau * tau for tau in group.task_vectors]
        if mask is not None:
            squares = [torch.where(mask, square, 0.0) for square in squares]
        return {f"{group.name}:energy": chunk_sums(group, squares)}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return the threshold and `energy`, the mean squares, [K], float64."""
        energy = done[f"{name}:energy"].sum(0) / max(1, numel)
        return {**self._threshold(done, name, numel), "energy": energy}

    def _threshold(self, done: State, name: str, numel: int) -> Value:
        return {} if self.density == 1.0 else super().value(done, name, numel)
