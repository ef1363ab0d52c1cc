"""Pull the experts' average towards the base as far as they disagree."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup, needs_by
from mergewell.statistics.inner_products import InnerProducts
from mergewell.statistics.ops import rows_of

_PRODUCTS = InnerProducts(of="task_vectors")


def _needs(method: ModelStock) -> Needs:
    return Needs(base=True, granularity="row" if method.scope == "row" else "element")


class ModelStock(MergeMethod):
    """Pull the experts' average towards the base as far as they disagree.

    theta = theta_0 + t mean_k tau_k, t = K c / (1 + (K - 1) c), c the mean pairwise cosine.

    Paper: Jang et al. 2024, "Model Stock", arXiv:2403.19522, section 4, eq. 3 and appendix.
    Departures: for experts of one task; those of different tasks are nearly orthogonal, c is near
    0 and the base comes back. Opposed experts (1 + (K - 1) c below 1e-6) give the base, as in
    mergekit 0.1.5. A task vector of 0 has cosine 0 with all. Coefficients are not used.
    mergekit's model_stock: the defaults, scope="row" for filter_wise: true; it also lifts products
    of norms to 1e-6, which shrinks the cosines of rows that hardly moved.
    """

    paper: ClassVar[str] = "arXiv:2403.19522"
    needs: ClassVar[Needs] = needs_by(_needs)
    laws: ClassVar[Laws] = Laws()

    scope: Literal["tensor", "row"] = "tensor"
    """Take one cosine for each tensor, or for each row (output unit, "filter")."""

    def statistics(self) -> tuple[InnerProducts, ...]:
        """Return the inner products of whole tensors."""
        return (_PRODUCTS,) if self.scope == "tensor" else ()

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the mean task vector times t."""
        taus = group.task_vectors
        shape = taus[0].shape
        ratio = self._ratio(group).to(taus[0].dtype)
        pulled = ratio * rows_of(ops.total(taus) / len(taus))
        return group.required_base + pulled.reshape(shape)

    def _ratio(self, group: TensorGroup) -> Tensor:
        """Return t, [rows, 1] or a number, float64."""
        count = len(group.experts)
        if count == 1:
            return torch.ones((), dtype=torch.float64)
        if self.scope == "tensor":
            products = group.statistic(_PRODUCTS)["products"]
            pairs = [_cosine(products[i, i], products[i, j], products[j, j])
                     for i in range(count) for j in range(i + 1, count)]  # fmt: skip
        else:
            rows = [rows_of(tau).to(torch.float64) for tau in group.task_vectors]
            norms = [(row * row).sum(1, keepdim=True) for row in rows]
            pairs = [_cosine(norms[i], (rows[i] * rows[j]).sum(1, keepdim=True), norms[j])
                     for i in range(count) for j in range(i + 1, count)]  # fmt: skip
        cosine = ops.total(pairs) / len(pairs)
        below = 1 + (count - 1) * cosine
        singular = below.abs() < 1e-6
        return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, below))


def _cosine(first: Tensor, cross: Tensor, second: Tensor) -> Tensor:
    norms = (first * second).sqrt()
    return torch.where(norms == 0, 0.0, cross / torch.where(norms == 0, 1.0, norms)).clamp(-1, 1)
