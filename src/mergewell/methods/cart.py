"""Add each expert's leading directions about the average, not about the base (CART)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from mergewell.matrices import TaskMatrices, TruncatedMerge
from mergewell.methods import ops
from mergewell.methods.base import METHODS, Fraction, Laws, MergeMethod, Needs, TensorGroup


class Cart(TruncatedMerge):
    """Add each expert's leading directions about the average, not about the base (CART).

    theta = theta_avg + scale * sum_k truncated(theta_k - theta_avg). No base is needed.

    Paper: Choi et al. 2024, "Revisiting weight averaging", arXiv:2412.12153, section 4.
    Departures: `scale` is given, not tuned on validation data; AdaRank (arXiv:2503.22178) starts
    from scale 2.3 at density 0.16. Coefficients are divided by their mean, weigh the average and
    multiply what is added. What is no matrix is averaged.
    """

    paper: ClassVar[str] = "arXiv:2412.12153"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "density": (0.04, 0.08, 0.16, 0.32),
    }
    needs: ClassVar[Needs] = Needs(granularity="matrix")
    laws: ClassVar[Laws] = Laws()

    density: Fraction = 0.08
    """Share of the directions of each expert that is kept."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the average plus the truncated differences of the experts to it."""
        weights = group.coefficients / (group.coefficients.sum() / len(group.experts))
        mean = ops.weighted_sum(weights, group.experts) / len(group.experts)
        return super().merge(replace(group, base=mean, coefficients=weights))

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the sum of the truncated differences."""
        rank = max(1, int(matrices.rank * self.density + 1e-9))
        return ops.total([self.leading(matrices, k, rank).matrix() for k in range(len(matrices))])

    def others(self) -> MergeMethod:
        """Return the average."""
        return METHODS.build("average", {})

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero: there is no average."""
        return ops.zero_sum(coefficients)
