"""Exact k-th largest magnitudes of task vectors from histograms of the float bits; never a sort.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mergewell.component import Fractions, Probability, for_each
from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic, chunk_sums, kept_count, reached, sort_key
from mergewell.tensor_group import TensorGroup, Value

__all__ = ["MagnitudeNorms", "MagnitudeThreshold", "kept_count", "magnitude_key"]


def magnitude_key(tensor: Tensor) -> Tensor:
    """Return |x| rounded to float32 as int32 bits, which sort as the magnitudes do."""
    return sort_key(tensor.abs())


class MagnitudeThreshold(OrderStatistic):
    """The magnitude that the k largest entries of each task vector reach, k = density x size.

    With `outliers` there are two: the largest floor(outliers * size) entries are to be passed
    over and the k after them kept; fewer are passed over where k would not be left.

    Departures: k = floor(density * size) but at least 1, as in mergekit 0.1.5 (0.1.4 refused 0).
    """

    density: Fractions
    """Fraction of the entries to keep, of all experts or of each."""

    outliers: Probability | tuple[Probability, ...] | None = None
    """Fraction of the entries, the largest, that comes before those to keep."""

    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        """Return the magnitudes of the task vectors."""
        del stage, found
        return [tau.abs() for tau in group.task_vectors]

    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        """Return k, or the number passed over and that plus k, for each expert."""
        del stage, positive
        sizes = [int(size) for size in counts]
        kept = [kept_count(d, n) for d, n in zip(self._densities(len(sizes)), sizes, strict=True)]
        if self.outliers is None:
            return torch.tensor(kept)[:, None]
        outliers = for_each(self.outliers, len(sizes))
        passed = [
            min(int(fraction * size + 1e-9), size - k)
            for fraction, size, k in zip(outliers, sizes, kept, strict=True)
        ]
        return torch.tensor([[p, p + k] for p, k in zip(passed, kept, strict=True)])

    def mask(self, group: TensorGroup, value: Value, expert: int) -> Tensor:
        """Return where an expert's task vector is kept in this block: k entries of the tensor."""
        key = magnitude_key(group.task_vectors[expert])
        if self.outliers is None:
            return reached(key, value, expert, group.offset)
        inner = reached(key, value, 2 * expert, group.offset)
        return reached(key, value, 2 * expert + 1, group.offset) & ~inner

    def _densities(self, experts: int) -> tuple[float, ...]:
        return for_each(self.density, experts)


class MagnitudeNorms(MagnitudeThreshold):
    """The thresholds, and the L1 norm of each task vector whole and of what they keep."""

    passes: ClassVar[int] = 4

    def update(self, done: State, group: TensorGroup, index: int) -> State:
        """Return one block's counts or, in the last pass, its norms by chunk, [C, 2 K]."""
        if index < 3:
            return super().update(done, group, index)
        value = super().value(done, group.name, group.whole_numel)
        sizes = [tau.abs() for tau in group.task_vectors]
        kept = [
            torch.where(self.mask(group, value, expert), size, 0.0)
            for expert, size in enumerate(sizes)
        ]
        return {f"{group.name}:norms": chunk_sums(group, [*sizes, *kept])}

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return the thresholds and the norms `whole` and `kept`, [K] each, float64."""
        whole, kept = done[f"{name}:norms"].sum(0).chunk(2)
        return {**super().value(done, name, numel), "whole": whole, "kept": kept}
