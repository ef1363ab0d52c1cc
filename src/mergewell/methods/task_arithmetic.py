"""Add the experts' task vectors to the base."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class TaskArithmetic(MergeMethod):
    """Add the experts' scaled task vectors to the base.

    theta = theta_0 + scale * sum_k c_k (theta_k - theta_0). A negative coefficient unlearns.

    Paper: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv:2212.04089, section 2.
    Departures: `scale` multiplies the sum; papers that scale the mean use scale = c / K.
    """

    paper: ClassVar[str] = "arXiv:2212.04089"
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal task vectors add up to K times one; coefficients 1/K average them.",
        neutral={"scale": 1.0},
    )

    scale: float = 0.3
    """Factor on the sum of the task vectors; 0.3 to 0.4 suits 4 to 8 experts."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the scaled sum of the task vectors."""
        return group.required_base + self.scale * ops.weighted_sum(
            group.coefficients, group.task_vectors
        )
