"""Average the experts' parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, TensorGroup


class Average(MergeMethod):
    """Average the experts' parameters, weighted by their coefficients.

    theta = sum_k c_k theta_k / sum_k c_k. The base is not a member.

    Paper: Wortsman et al. 2022, "Model soups", arXiv:2203.05482, section 2 (uniform soup).
    Departures: none; other tools call the same method "linear".
    """

    paper: ClassVar[str] = "arXiv:2203.05482"
    laws: ClassVar[Laws] = Laws(neutral={"normalize": True})

    normalize: bool = True
    """Divide by the sum of the coefficients."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the weighted average of the experts."""
        summed = ops.weighted_sum(group.coefficients, group.experts)
        return summed / group.coefficients.sum() if self.normalize else summed

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero when they are to be divided by their sum."""
        if self.normalize and abs(sum(coefficients)) < 1e-8:
            return "coefficients sum to 0; change one, or set normalize=false"
        return ""
