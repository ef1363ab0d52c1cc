"""Centred kernel alignment (CKA) between the models at one block."""

from __future__ import annotations

import torch
from torch import Tensor

from mergewell.errors import DataError
from mergewell.statistics.activation import BlockOutputs
from mergewell.statistics.base import State, Statistic
from mergewell.tensor_group import Value

FEWEST = 4
"""Samples that a batch must have: the unbiased estimate divides by N - 3."""


class ActivationCka(Statistic[BlockOutputs]):
    """Linear CKA of the pooled outputs of every two models, [P, P], from unbiased HSIC estimates.

    HSIC_1 of each batch is summed, so that batches and machines can be joined; the ratio is taken
    in the end. Source: Song et al. 2012, equation 5 (HSIC_1); Nguyen, Raghu and Kornblith 2021,
    arXiv:2010.15327, section 3 (mean over minibatches). Departures: a batch of fewer than 4
    samples has no estimate and is counted in `left_out` instead.
    """

    def update(self, state: State, batch: BlockOutputs) -> State:
        """Return the state with one more batch."""
        one, none = (torch.tensor(number, dtype=torch.float64) for number in (1, 0))
        if batch.pooled.shape[1] < FEWEST:
            return self.join(state, {"left_out": one})
        hsic = _hsic(_kernels(batch.pooled))
        return self.join(state, {"hsic": hsic, "batches": one, "left_out": none})

    def value(self, state: State) -> Value:
        """Return `cka` [P, P], float64; 0 where a model's features do not vary.

        An unbiased estimate may lie a little outside [0, 1].

        Raises:
            DataError: no batch had enough samples.
        """
        if "hsic" not in state:
            raise DataError(
                f"CKA needs batches of at least {FEWEST} samples; give more data at a time."
            )
        own = state["hsic"].diagonal().clamp(min=0).sqrt()
        scale = own[:, None] * own
        return {"cka": torch.where(scale > 0, state["hsic"] / scale, torch.zeros_like(scale))}


def _kernels(features: Tensor) -> Tensor:
    """Return the linear kernels [P, N, N] with 0 on their diagonals.

    Features are centred first: HSIC_1 is the same, and its sums keep their digits.
    """
    centred = features.to(torch.float64)
    centred = centred - centred.mean(1, keepdim=True)
    kernels = centred @ centred.mT
    kernels.diagonal(dim1=1, dim2=2).zero_()
    return kernels


def _hsic(kernels: Tensor) -> Tensor:
    """Return HSIC_1 of every two kernels, [P, P]."""
    n = kernels.shape[1]
    rows = kernels.sum(2)
    totals = rows.sum(1)
    traces = kernels.flatten(1) @ kernels.flatten(1).T
    means = totals[:, None] * totals / ((n - 1) * (n - 2))
    return (traces + means - 2 / (n - 2) * (rows @ rows.T)) / (n * (n - 3))
