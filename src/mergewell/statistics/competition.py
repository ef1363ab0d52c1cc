"""How the experts' changes compete for each parameter, and the thresholds of their scores.

Shapes: K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.component import Fraction
from mergewell.statistics.base import State
from mergewell.statistics.ops import OrderStatistic, key_value
from mergewell.tensor_group import TensorGroup, Value


def clamped(group: TensorGroup, limits: Tensor) -> list[Tensor]:
    """Return the task vectors' magnitudes clamped to each expert's limits, [K, 2]."""
    sides = limits.to(group.experts[0].dtype)
    pairs = zip(group.task_vectors, sides, strict=True)
    return [tau.abs().clamp(min=low, max=high) for tau, (low, high) in pairs]


def competition(group: TensorGroup, limits: Tensor) -> list[Tensor]:
    """Return K scores: exp(K m^2) tanh(tau_k sum tau), m the clamped magnitude scaled to [0, 1]."""
    sides = limits.to(group.experts[0].dtype)
    together = group.task_vectors[0]
    for tau in group.task_vectors[1:]:
        together = together + tau
    scores: list[Tensor] = []
    sizes = clamped(group, limits)
    for tau, size, (low, high) in zip(group.task_vectors, sizes, sides, strict=True):
        width = torch.where(high > low, high - low, 1.0)
        within = (size - low) / width
        scores.append((len(sizes) * within * within).exp() * (tau * together).tanh())
    return scores


class CompetitionThresholds(OrderStatistic):
    """The limits of the magnitudes, and the scores between which competition is decided.

    First each expert's magnitudes at the quantiles `clamp` and 1 - `clamp`; then, of the scores
    that follow from these limits, the one at the quantile 1 - `density` and the largest.

    Source: PCB-Merging, arXiv:2410.02396, section 3.2; quantiles are places floor(q n) as there.
    """

    stages: ClassVar[int] = 2
    signed: ClassVar[bool] = True
    cuts_ties: ClassVar[bool] = False
    passes: ClassVar[int] = 4

    density: Fraction
    """Fraction of the scores above the lower threshold."""

    clamp: Annotated[float, Field(ge=0, lt=0.5)]
    """Fraction of the magnitudes beyond each limit."""

    def scores(self, group: TensorGroup, stage: int, found: Value) -> Sequence[Tensor]:
        """Return the magnitudes, then the scores."""
        if stage == 0:
            return [tau.abs() for tau in group.task_vectors]
        return competition(group, key_value(found["key0"]))

    def ranks(self, stage: int, counts: Tensor, positive: Tensor) -> Tensor:
        """Return the places from the top, [K, 2]: lower and upper."""
        del positive
        return torch.tensor([self._places(stage, int(size)) for size in counts])

    def _places(self, stage: int, size: int) -> list[int]:
        quantile = self.clamp if stage == 0 else 1 - self.density
        lower = min(size - 1, int(size * quantile + 1e-9))
        upper = int(size * (1 - self.clamp) + 1e-9) - 1 if stage == 0 else size - 1
        return [max(0, size - lower), max(0, size - max(upper, 0))] if size else [0, 0]

    def value(self, done: State, name: str, numel: int) -> Value:
        """Return `limits` and `scores`, [K, 2] each: lower and upper, float64."""
        del numel
        found = self.found(done, name)
        return {"limits": key_value(found["key0"]), "scores": key_value(found["key1"])}
