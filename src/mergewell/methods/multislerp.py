"""Average directions on the sphere and lengths on the line, of experts or task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup, needs_by
from mergewell.statistics.inner_products import InnerProducts


def _needs(method: Multislerp) -> Needs:
    return Needs(base=method.of == "task_vectors")


class Multislerp(MergeMethod):
    """Average directions on the sphere and lengths on the line, of experts or task vectors.

    theta = (sum_k w_k |theta_k|) u, u the mean direction: sum_k w_k log_u(theta_k / |theta_k|) = 0.

    For two experts with equal coefficients this is the middle of the arc, at their mean length.

    Paper: Buss and Fillmore 2001, "Spherical averages", ACM TOG 20(2), sections 2 and 3.
    Departures: the direction is the true Karcher mean. mergekit projects the directions onto the
    tangent plane at their mean instead, where they sum to 0, so that its result is the normalised
    mean direction: tangent="projection". Directions that cancel take the straight line.
    mergekit's multislerp: tangent="projection", normalize for normalize_weights, with a
    base_model of="task_vectors"; its eps of 1e-8 is not added to the lengths.
    """

    paper: ClassVar[str] = "doi:10.1145/502122.502124"
    needs: ClassVar[Needs] = needs_by(_needs)
    laws: ClassVar[Laws] = Laws(
        translation="directions of experts depend on where the origin is.",
        neutral={"normalize": True},
    )

    of: Literal["experts", "task_vectors"] = "experts"
    """Average the experts themselves, or their task vectors and add the base."""

    tangent: Literal["logarithm", "projection"] = "logarithm"
    """Average by logarithms until it settles (the Karcher mean), or by one flat projection."""

    normalize: bool = True
    """Divide the coefficients by their sum; it matters for the length only."""

    def statistics(self) -> Sequence[InnerProducts]:
        """Return the inner products: the mean lies in the span of the vectors."""
        return (InnerProducts(of=self.of),)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the mean direction at the mean length."""
        shares = group.coefficients
        if self.normalize:
            shares = shares / shares.sum()
        weights = ops.sphere_weights(
            group.statistic(self.statistics()[0])["products"],
            shares,
            iterations=100 if self.tangent == "logarithm" else 0,
            tolerance=1e-10,
        )
        vectors = group.experts if self.of == "experts" else group.task_vectors
        merged = ops.weighted_sum(weights.to(vectors[0].dtype), vectors)
        return merged if self.of == "experts" else group.required_base + merged

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero."""
        return ops.zero_sum(coefficients)
