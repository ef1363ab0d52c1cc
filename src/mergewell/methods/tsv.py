"""Keep each expert's leading singular directions and make them all orthogonal (TSV-M)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.matrices import TaskMatrices, TruncatedMerge
from mergewell.methods.base import Fraction, Laws


class Tsv(TruncatedMerge):
    """Keep each expert's leading singular directions and make them all orthogonal (TSV-M).

    Delta = polar([U_1 .. U_K]) diag(S_1 .. S_K) polar([V_1 .. V_K])', of the r / K longest
    directions of each task matrix c_k (theta_k - theta_0) = U S V', r its shorter side.

    Paper: Gargiulo et al. 2025, "Task singular vectors", arXiv:2412.00081, section 4, algorithm 1.
    Departures: at least one direction of each expert is kept, where the code keeps none if K > r.
    Directions of no length are left out. Kernels of convolutions count as matrices; embeddings and
    heads do not (the code's exception is CLIP's text_projection).
    """

    paper: ClassVar[str] = "arXiv:2412.00081"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="Only the r / K longest directions of each expert are kept.",
        neutral={"density": 1.0, "scale": 1.0},
    )

    density: Fraction | None = None
    """Share of the directions of each expert that is kept; 1 / K unless given."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the orthogonalised leading directions times their singular values."""
        share = 1 / len(matrices) if self.density is None else self.density
        rank = max(1, int(matrices.rank * share + 1e-9))
        tops = [self.leading(matrices, k, rank) for k in range(len(matrices))]
        left = self.polar(torch.cat([top.left for top in tops], dim=1))
        right = self.polar(torch.cat([top.right for top in tops], dim=1))
        return (left * torch.cat([top.values for top in tops])) @ right.T
