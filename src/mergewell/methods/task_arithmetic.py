"""Add the experts' task vectors to the base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class TaskArithmetic(MergeMethod):
    """Add the experts' scaled task vectors to the base.

    theta = theta_0 + scale * sum_k c_k (theta_k - theta_0). A negative coefficient unlearns.

    Paper: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089, section 2.
    Departures: `scale` multiplies the sum; papers that scale the mean use scale = c / K.
    mergekit's task_arithmetic: scale for lambda (1.0 unless given), divide="coefficients" for
    normalize: true.
    """

    paper: ClassVar[str] = "arXiv:2212.04089"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one; coefficients 1/K average them.",
        neutral={"scale": 1.0, "divide": "none"},
    )

    scale: float = 0.3
    """Factor on the sum of the task vectors; 0.3 to 0.4 suits 4 to 8 experts."""

    divide: Literal["none", "coefficients", "count"] = "none"
    """Divide the sum by the coefficients' sum (unless that is below 1e-8), by K, or not at all."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled sum of the task vectors."""
        summed = ops.add_up(group, group.task_vectors, self.divide)
        return group.required_base + self.scale * summed
