"""Interpolate two experts along the arc between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, Probability, TensorGroup
from mergewell.statistics.inner_products import InnerProducts

_PRODUCTS = InnerProducts(of="experts")


class Slerp(MergeMethod):
    """Interpolate two experts along the arc between them, tensor by tensor.

    theta = sin((1 - t) w) / sin(w) theta_1 + sin(t w) / sin(w) theta_2, w the angle between them.

    Paper: Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH, section 3.3.
    Departures: falls back to the straight line where |cos w| >= `parallel` or a tensor is 0; the
    angle is that of the whole flattened tensor, summed in float64. Coefficients are not used.
    mergekit's slerp: the defaults, its base_model as the first expert.
    """

    paper: ClassVar[str] = "doi:10.1145/325165.325242"
    needs: ClassVar[Needs] = Needs(experts=2)
    laws: ClassVar[Laws] = Laws(
        order_free="t runs from the first expert to the second.",
        single_expert="two experts are needed.",
        translation="an arc depends on where the origin is.",
    )

    t: Probability = 0.5
    """Position on the arc: 0 is the first expert, 1 the second."""

    parallel: Probability = 0.9995
    """Absolute cosine from which on the straight line is taken."""

    def statistics(self) -> Sequence[InnerProducts]:
        """Return the inner products that give the angle."""
        return (_PRODUCTS,)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the point at `t` on the arc from the first expert to the second."""
        first, second = group.experts
        products = group.statistic(_PRODUCTS)["products"]
        sides = (products[0, 0], products[0, 1], products[1, 1])
        left, right = ops.arc_weights(sides, self.t, self.parallel)
        return left.to(first.dtype) * first + right.to(first.dtype) * second
