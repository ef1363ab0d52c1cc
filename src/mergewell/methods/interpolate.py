"""Interpolate two experts along the straight line."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup


class Interpolate(MergeMethod):
    """Interpolate two experts along the straight line.

    theta = (1 - t) theta_1 + t theta_2. Rules of the recipe give modules or layers a t of their
    own. From the base to experts: `wise_ft`.

    Paper: Wu et al. 2025, "Revisiting model interpolation", arXiv:2510.10977, section 2.
    Departures: none; it is task arithmetic with coefficients 1 - t and t on any base. t may lie
    outside [0, 1], which extrapolates. Coefficients are not used.
    """

    paper: ClassVar[str] = "arXiv:2510.10977"
    needs: ClassVar[Needs] = Needs(experts=2)
    laws: ClassVar[Laws] = Laws(
        order_free="t runs from the first expert to the second.",
        single_expert="two experts are needed.",
    )

    t: float = 0.5
    """Position on the line: 0 is the first expert, 1 the second."""

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the point at `t` on the line from the first expert to the second."""
        first, second = group.experts
        return (1 - self.t) * first + self.t * second
