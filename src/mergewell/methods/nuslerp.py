"""Interpolate two experts, or their task vectors, along the arc, by their coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, Probability, TensorGroup, needs_by
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.ops import rows_of

_GRANULARITY: dict[str, Literal["element", "row", "matrix"]] = {
    "tensor": "element",
    "row": "row",
    "column": "matrix",
}


def _needs(method: Nuslerp) -> Needs:
    return Needs(
        base=method.of == "task_vectors", experts=2, granularity=_GRANULARITY[method.along]
    )


class Nuslerp(MergeMethod):
    """Interpolate two experts, or their task vectors, along the arc, by their coefficients.

    The place on the arc is t = c_2 / (c_1 + c_2).

    Paper: Shoemake 1985, "Animating rotation with quaternion curves", SIGGRAPH, section 3.3.
    Departures: zero vectors take the straight line (mergekit takes a right angle); coefficients
    that sum to 0 are refused (mergekit: t = 0.5). A row is an output unit with all its inputs.
    mergekit's nuslerp: the defaults; with a base_model of="task_vectors"; nuslerp_flatten: false
    is along="row", with nuslerp_row_wise: true along="column".
    """

    paper: ClassVar[str] = "doi:10.1145/325165.325242"
    needs: ClassVar[Needs] = needs_by(_needs)
    laws: ClassVar[Laws] = Laws(
        single_expert="two experts are needed.",
        translation="an arc between experts depends on where the origin is.",
    )

    of: Literal["experts", "task_vectors"] = "experts"
    """Interpolate the experts themselves, or their task vectors and add the base."""

    along: Literal["tensor", "row", "column"] = "tensor"
    """Take one angle for each tensor, each row (output unit) or each column (input)."""

    parallel: Probability = 1 - 1e-12
    """Absolute cosine from which on the straight line is taken; it differs by less than 1e-12."""

    def statistics(self) -> Sequence[InnerProducts]:
        """Return the inner products that give the angle of a whole tensor."""
        return (InnerProducts(of=self.of),) if self.along == "tensor" else ()

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the point on the arc that the coefficients ask for."""
        whole = group.experts if self.of == "experts" else group.task_vectors
        first, second = (rows_of(tensor) for tensor in whole)
        left, right = ops.arc_weights(
            self._products(group, first, second),
            float(group.coefficients[1]) / float(group.coefficients.sum()),
            self.parallel,
        )
        merged = left.to(first.dtype) * first + right.to(first.dtype) * second
        merged = merged.reshape(whole[0].shape)
        return merged if self.of == "experts" else group.required_base + merged

    def _products(self, group: TensorGroup, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        if self.along == "tensor":
            products = group.statistic(self.statistics()[0])["products"]
            return products[0, 0], products[0, 1], products[1, 1]
        dim = 1 if self.along == "row" or group.experts[0].dim() < 2 else 0
        x, y = first.to(torch.float64), second.to(torch.float64)
        return tuple((a * b).sum(dim, keepdim=True) for a, b in ((x, x), (x, y), (y, y)))

    def objection(self, coefficients: Sequence[float]) -> str:
        """Refuse coefficients that sum to zero."""
        return ops.zero_sum(coefficients)
