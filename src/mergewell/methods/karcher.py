"""Average the experts' directions on the sphere, step by step, and their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, TensorGroup
from mergewell.statistics.inner_products import InnerProducts

_PRODUCTS = InnerProducts(of="experts")


class Karcher(MergeMethod):
    """Average the experts' directions on the sphere, step by step, and their lengths.

    theta = (sum_k w_k |theta_k|) u, with u such that sum_k w_k log_u(theta_k / |theta_k|) = 0.

    The order-free form of slerp for any number of experts, tensor by tensor.

    Paper: Karcher 1977, "Riemannian center of mass and mollifier smoothing", CPAM 30, section 1.
    Departures: computed from the inner products, since the mean lies in the experts' span.
    Coefficients weigh the experts; only tensors that are 0 count as having no direction, where
    mergekit leaves out those shorter than tol; directions that cancel take the straight line,
    where mergekit starts from the first expert.
    mergekit's karcher: the defaults (iterations for max_iter, tolerance for tol), coefficients 1.
    """

    paper: ClassVar[str] = "doi:10.1002/cpa.3160300502"
    laws: ClassVar[Laws] = Laws(
        translation="directions depend on where the origin is.",
    )

    iterations: Annotated[int, Field(ge=0)] = 10
    """Greatest number of steps; 0 gives the normalised mean direction."""

    tolerance: Annotated[float, Field(gt=0)] = 1e-5
    """Angle in radians of a step below which the mean has settled."""

    def statistics(self) -> Sequence[InnerProducts]:
        """Return the inner products: the mean lies in the span of the experts."""
        return (_PRODUCTS,)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the mean direction at the mean length."""
        weights = ops.sphere_weights(
            group.statistic(_PRODUCTS)["products"],
            group.coefficients / group.coefficients.sum(),
            iterations=self.iterations,
            tolerance=self.tolerance,
        )
        return ops.weighted_sum(weights.to(group.experts[0].dtype), group.experts)

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero."""
        return ops.zero_sum(coefficients)
