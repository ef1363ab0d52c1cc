"""Interpolate from the base to the experts' average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class WiseFt(MergeMethod):
    """Interpolate from the base to the experts' average, to keep more of what the base knows.

    theta = theta_0 + t sum_k c_k (theta_k - theta_0) / sum_k c_k.

    Paper: Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", arXiv:2109.01903, eq. 1.
    Departures: several experts are averaged first; the paper has one. t may lie outside [0, 1].
    """

    paper: ClassVar[str] = "arXiv:2109.01903"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "t": (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 2.2, 2.7, 3.4)
    }
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws(neutral={"t": 1.0})

    t: float = 0.5
    """Position on the line: 0 is the base, 1 the experts' average."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the point at `t` on the line from the base to the experts' average."""
        mean = ops.add_up(group, group.task_vectors, "coefficients")
        return group.required_base + self.t * mean

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero."""
        return ops.zero_sum(coefficients)
