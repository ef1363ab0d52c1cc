"""Gram matrix of a linear layer's inputs, h^T h summed over all observations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one linear layer of one model was given for one batch."""

    inputs: Tensor
    """[..., I]; the other dimensions count observations."""

    keep: Tensor | None = None
    """Boolean, the shape of the inputs without I; false on padding."""


class ActivationGram(Statistic[LayerInputs]):
    """Sum of h h^T over all observations h of a layer's input, [I, I].

    Source: Jin et al. 2023, "RegMean", arXiv:2212.09849, equation 2. Departures: padding is left
    out. Products are made in the inputs' dtype (float32), sums over batches in float64.
    """

    def update(self, state: State, batch: LayerInputs) -> State:
        """Return the state with one more batch."""
        inputs = batch.inputs
        rows = inputs.flatten(0, -2) if batch.keep is None else inputs[batch.keep]
        gram = (rows.T @ rows).to(torch.float64)
        count = torch.tensor(len(rows), dtype=torch.float64)
        return self.join(state, {"gram": gram, "count": count})

    def value(self, state: State) -> Value:
        """Return `gram` [I, I] and `count` [], float64."""
        return state
