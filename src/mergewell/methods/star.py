"""Cut task matrices down to leading directions, restore their size, and average (STAR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.matrices import SpectralMerge, TaskMatrices
from mergewell.methods import ops
from mergewell.methods.base import Fraction, Laws


class Star(SpectralMerge):
    """Cut task matrices down to leading directions, restore their size, and average (STAR).

    theta = theta_0 + scale mean_k(U_k S_k V_k' sum(all S_k) / sum(kept S_k)).

    Of each c_k (theta_k - theta_0) as few directions are kept as hold the share `keep` of the sum
    of its singular values; these are scaled up so that the sum is what it was.

    Paper: Lee et al. 2025, "STAR: Spectral truncation and rescale", arXiv:2502.10339, section 3.
    Departures: none; the share is eta of the paper, in (0, 1] instead of percent.
    """

    paper: ClassVar[str] = "arXiv:2502.10339"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "keep": (0.2, 0.4, 0.7),
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0),
    }
    laws: ClassVar[Laws] = Laws(neutral={"keep": 1.0, "scale": 1.0})

    keep: Fraction = 0.4
    """Share of the sum of singular values that is kept."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the average of the truncated and rescaled task matrices."""
        cut = [self._cut(matrices[k]) for k in range(len(matrices))]
        return ops.total(cut) / len(matrices)

    def _cut(self, matrix: Tensor) -> Tensor:
        factors = self.factors(matrix)
        if not len(factors.values):
            return factors.matrix()
        held = factors.values.to(torch.float64).cumsum(0)
        rank = int((held < self.keep * held[-1] * (1 - 1e-9)).sum()) + 1
        top = factors.top(rank)
        return top.matrix(top.values * float(held[-1] / held[rank - 1]))
