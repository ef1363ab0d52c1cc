"""Add experts one after another, each without what it shares with the merge so far (OPCM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import SpectralMerge, TaskMatrices
from mergewell.methods.base import Laws, Probability


class Opcm(SpectralMerge):
    """Add experts one after another, each without what it shares with the merge so far (OPCM).

    With the merged task matrix U S V' so far, the next one, P = U' M V, is freed of its diagonal
    and of its block on the p leading directions, which hold the share `alpha` of the sum of S. In
    the end the sum is given the mean norm of the task matrices.

    Paper: Tang et al. 2025, "Merging models on the fly", arXiv:2501.09522, section 4; its code.
    Departures: norms are matched in each tensor, not over the model, for which another pass would
    be needed; the paper's factors lambda_t cancel but for that. What is no matrix is averaged.
    """

    paper: ClassVar[str] = "arXiv:2501.09522"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "alpha": (0.3, 0.5, 0.7),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        order_free="Experts come one after another, and each makes way for those before it."
    )

    alpha: Probability = 0.5
    """Share of the sum of singular values that later experts must leave alone."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the task matrices added one by one, at their mean norm."""
        merged = matrices[0]
        norms = [linalg.frobenius(merged)]
        for k in range(1, len(matrices)):
            matrix = matrices[k]
            norms.append(linalg.frobenius(matrix))
            merged = merged + self._freed(matrix, self.factors(merged))
        norm = linalg.frobenius(merged)
        return merged * (sum(norms) / len(norms) / norm) if norm > 0 else merged

    def _freed(self, matrix: Tensor, so_far: linalg.Factors) -> Tensor:
        """Return a task matrix without its diagonal and leading block in the basis so far."""
        if not len(so_far.values):
            return matrix
        held = so_far.values.to(torch.float64).cumsum(0)
        above = (held > self.alpha * held[-1]).nonzero()
        leading = int(above[0]) if len(above) else 0
        parts = so_far.left.T @ matrix @ so_far.right
        taken = torch.diag(parts.diagonal())
        taken[:leading, :leading] = parts[:leading, :leading]
        return matrix - so_far.left @ taken @ so_far.right.T
