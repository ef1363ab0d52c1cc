"""TSV-M with strong experts and strong inputs made stronger: the data-free scaling of ESM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergewell.matrices import TaskMatrices, TruncatedMerge
from mergewell.methods.base import Fraction, Laws


class Esm(TruncatedMerge):
    """TSV-M with strong experts and strong inputs made stronger: the data-free scaling of ESM.

    Of the r / K longest directions of each expert, A_k = S_k V_k'. Expert k counts with
    (||A_k|| / mean ||A||)^2, input j with (||a_j|| / mean ||a||)^2, a_j the column j of all A_k.

    Paper: "Model merging in the essential subspace" (ESM), arXiv:2602.20208, CVPR 2026 (a summary).
    Departures: directions are singular ones; the paper's main form takes those in which inputs move
    the layer's outputs, from 32 samples. Where the scales multiply was not found: here expert
    scales the singular values and inputs the columns of the result. The paper's third scale, of
    layers by (||Delta|| / mean over layers)^2, would need another pass and is left out.
    """

    paper: ClassVar[str] = "arXiv:2602.20208"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "expert_power": (1.0, 2.0),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="Only the r / K longest directions of each expert are kept.",
        neutral={"density": 1.0, "input_power": 0.0, "scale": 1.0},
    )

    density: Fraction | None = None
    """Share of the directions of each expert that is kept; 1 / K unless given."""

    expert_power: float = 2.0
    """Power of an expert's norm against the mean that it counts with; 0 and 0 are `tsv`."""

    input_power: float = 2.0
    """Power of an input's norm against the mean that its column is scaled with."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the orthogonalised leading directions, experts and inputs scaled."""
        share = 1 / len(matrices) if self.density is None else self.density
        rank = max(1, int(matrices.rank * share + 1e-9))
        tops = [self.leading(matrices, k, rank) for k in range(len(matrices))]
        left = self.polar(torch.cat([top.left for top in tops], dim=1))
        right = self.polar(torch.cat([top.right for top in tops], dim=1))
        norms = torch.stack([top.values.square().sum().sqrt() for top in tops])
        scales = _against_mean(norms, self.expert_power)
        values = torch.cat([top.values * s for top, s in zip(tops, scales, strict=True)])
        columns = torch.cat([top.right * top.values for top in tops], dim=1)
        inputs = _against_mean(columns.square().sum(1).sqrt(), self.input_power)
        return (left * values) @ right.T * inputs


def _against_mean(norms: Tensor, power: float) -> Tensor:
    mean = norms.mean()
    return (norms / mean) ** power if float(mean) > 0 else torch.ones_like(norms)
