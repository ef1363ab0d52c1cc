"""Weigh task matrices by the inputs that their own covariances stand for (ACE-Merging)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import SpectralMerge, TaskMatrices
from mergewell.methods import ops
from mergewell.methods.base import Fraction, Laws


class Ace(SpectralMerge):
    """Weigh task matrices by the inputs that their covariances stand for (ACE-Merging).

    With M_k = c_k (theta_k - theta_0) less the mean of its rows, G_k = M_k' M_k + epsilon:
    Delta = (sum_k M_k G_k) (sum_k G_k + P)^-1, each row of P the mean row of sum_k M_k' M_k. Where
    the experts' sizes differ much (the variance of log ||M_k||^2 over its mean squared is above
    `threshold`) G_k is divided by its trace, and an isotropic correction is added: the leading
    directions of Delta + sum_k M_k (G_k - mean G), all of their mean length.

    Paper: Xu et al. 2026, "ACE-Merging", arXiv:2603.02945, read in its code.
    Departures: computed in float64. The means of the rows are lost, as in the code. `epsilon` is in
    squared units of the weights and sensitive: authors use 0.04 (GPT-2), 2e-4 (RoBERTa), 1e-5.
    """

    paper: ClassVar[str] = "arXiv:2603.02945"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "threshold": (0.1, 0.3),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        single_expert="Row means are dropped, and the prior P shrinks a single expert too.",
        equal_experts="Row means are dropped, and the prior P shrinks equal experts too.",
        scale="epsilon is absolute, and so is the prior's part of it.",
    )

    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the diagonal of each expert's covariance, in squared units of the weights."""

    threshold: Annotated[float, Field(ge=0)] = 0.3
    """Spread of the experts' sizes above which they are evened out and corrected."""

    leading: Fraction = 0.3
    """Share of the directions that the correction keeps."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the covariance-weighted combination."""
        wide = [matrix.to(torch.float64) for matrix in matrices]
        centred = [matrix - matrix.mean(0) for matrix in wide]
        sizes = torch.stack([matrix.square().sum() for matrix in wide])
        uneven = len(wide) > 1 and _spread(sizes) > self.threshold
        grams = [linalg.gram(matrix) for matrix in centred]
        traces = [float(g.diagonal().sum()) + 1e-12 if uneven else 1.0 for g in grams]
        grams = [g / trace for g, trace in zip(grams, traces, strict=True)]
        floors = [self.epsilon / trace for trace in traces]
        pull = ops.total(
            [m @ g + floor * m for m, g, floor in zip(centred, grams, floors, strict=True)]
        )
        covariance = ops.total(grams)
        prior = covariance.mean(0) / (float(sizes.mean()) if uneven else 1.0)
        whole = covariance + prior
        whole.diagonal().add_(sum(floors))
        delta = _divided(pull, whole)
        if uneven:
            mean = covariance / len(wide)
            rest = ops.total([m @ (g - mean) for m, g in zip(wide, grams, strict=True)])
            top = self.factors(rest + delta, int(self.leading * matrices.rank + 1e-9))
            if len(top.values):
                delta = delta + top.matrix(top.values.mean().expand(len(top.values)))
        return delta.to(matrices.base.dtype)


def _spread(sizes: Tensor) -> float:
    """Return var(log x) / mean(log x)^2, 0 where an expert did not move at all."""
    if bool((sizes == 0).any()):
        return 0.0
    logs = sizes.log()
    return float(logs.var() / (logs.mean().square() + 1e-12))


def _divided(right: Tensor, whole: Tensor) -> Tensor:
    """Return right times the inverse of a matrix, or its pseudo-inverse where it has none."""
    factor, pivots, failed = cast("tuple[Tensor, Tensor, Tensor]", torch.linalg.lu_factor_ex(whole))
    if int(failed):
        return right @ cast("Tensor", torch.linalg.pinv(whole))
    return cast("Tensor", torch.linalg.lu_solve(factor, pivots, right, left=False))
