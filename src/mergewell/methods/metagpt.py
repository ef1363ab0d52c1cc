"""Weigh task vectors by their squared norms, which adds up to one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergewell.methods import ops
from mergewell.methods.base import Laws, MergeMethod, Needs, TensorGroup
from mergewell.statistics.inner_products import InnerProducts


class Metagpt(MergeMethod):
    """Weigh task vectors by their squared norms over the whole model, which adds up to one.

    theta = theta_0 + sum_k c_k lambda_k tau_k, lambda_k = ||tau_k||^2 / sum_j ||tau_j||^2.

    Paper: Zhou et al. 2024, "MetaGPT", arXiv:2406.11385, section 3.3 (optimal coefficients).
    Departures: none; with scope="tensor" each tensor has coefficients of its own. The most
    strongly trained expert dominates, and K experts are scaled down to one together.
    """

    paper: ClassVar[str] = "arXiv:2406.11385"
    needs: ClassVar[Needs] = Needs(base=True)
    laws: ClassVar[Laws] = Laws()

    scope: Literal["model", "tensor"] = "model"
    """Take the norms of the whole model (paper), or of each tensor."""

    def statistics(self) -> Sequence[InnerProducts]:
        """Return the inner products, whose diagonal holds the squared norms."""
        return (InnerProducts(of="task_vectors", scope=self.scope),)

    def shares(self, products: Tensor) -> Tensor:
        """Return the experts' shares [K] of the squared norms, of `products` [K, K]."""
        energy = products.diagonal()
        whole = energy.sum()
        return energy / torch.where(whole == 0, 1.0, whole)

    def merge(self, group: TensorGroup) -> Tensor:
        """Return the base plus the task vectors weighed by their squared norms."""
        shares = self.shares(group.statistic(self.statistics()[0])["products"])
        weights = group.coefficients * shares.to(group.coefficients.dtype)
        return group.required_base + ops.weighted_sum(weights, group.task_vectors)
