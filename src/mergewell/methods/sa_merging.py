"""Keep the entries of task vectors that strengthen the layer together with the others'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mergewell.matrices import MatrixMerge, TaskMatrices
from mergewell.methods import ops
from mergewell.methods.base import Laws


class SaMerging(MatrixMerge):
    """Keep the entries of task vectors that strengthen a layer with the others (SA-Merging).

    theta = theta_0 + scale sum_k m_k tau_k, m_k a mask on the saliencies.

    The connectivity of expert k is the sum of |theta_0 + tau_k|; the saliency of an entry is its
    derivative, sign(theta_0 + tau_k), times sum_j tau_j. The lowest are dropped, in several
    rounds, and what is left of the task vectors tau_k is added up.

    Paper: Park et al. 2026, "SA-Merging", arXiv:2606.00511 (a summary; no code is published).
    Departures: the paper's connectivity is the product of |weights| along the whole network, which
    needs the model in memory and an order of its layers that is not published for attention and
    residuals. Here the chain is cut: each matrix is one by itself. Coefficients multiply the task
    vectors. What is no matrix is averaged.
    """

    paper: ClassVar[str] = "arXiv:2606.00511"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "drop": (0.1, 0.2, 0.4),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one; coefficients 1/K average them.",
        translation="Saliency depends on the signs of the weights themselves.",
        neutral={"drop": 0.0, "scale": 1.0},
    )

    drop: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the entries still there that each round drops."""

    rounds: Annotated[int, Field(ge=0)] = 10
    """Rounds; saliency is found anew in each."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the sum of what is left of the task matrices."""
        taus = list(matrices)
        if self.drop == 0:
            return ops.total(taus)
        left = taus[0].numel()
        kept = [torch.ones_like(tau, dtype=torch.bool) for tau in taus]
        for _ in range(self.rounds):
            left = max(1, round(left * (1 - self.drop)))
            summed = ops.total(taus)
            for k, tau in enumerate(taus):
                saliency = torch.sign(matrices.base + tau) * summed
                ranked = torch.where(kept[k], saliency, -torch.inf).flatten()
                order = ranked.sort(descending=True, stable=True).indices
                mask = torch.zeros_like(kept[k]).flatten()
                mask[order[:left]] = True
                kept[k] = mask.view(tau.shape) & kept[k]
            taus = [torch.where(mask, tau, 0.0) for mask, tau in zip(kept, taus, strict=True)]
        return ops.total(taus)
