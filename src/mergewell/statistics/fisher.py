"""Fisher information, its diagonal: squared gradients of the log-likelihood of a model's answers.

Shapes: D... those of one parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value


@dataclass(frozen=True, slots=True)
class SquaredGradients:
    """What one batch adds for one parameter of one model."""

    squares: Tensor
    """Sum over the batch's samples of each one's squared gradient, [D...]."""

    samples: int


class Fisher(Statistic[SquaredGradients]):
    """Mean over samples of the squared gradient of the log-likelihood, [D...].

    Source: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging",
    arXiv:2111.09832, equation 4. Departures: none. Sums are kept in float32, as the gradients are.
    """

    def update(self, state: State, batch: SquaredGradients) -> State:
        """Return the state with one more batch."""
        count = torch.tensor(batch.samples, dtype=torch.float64)
        return self.join(state, {"squares": batch.squares.float(), "count": count})

    def value(self, state: State) -> Value:
        """Return `fisher` [D...] and `count` []."""
        return {"fisher": state["squares"] / state["count"], "count": state["count"]}
