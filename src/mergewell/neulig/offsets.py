"""Offsets: how far the experts lie from their mean, and what a merge's coefficients make of it.

Shapes: N samples, K experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergewell.blocks import Block, read
from mergewell.plan import BLOCK, Plan

Penalty = Literal["scalar", "offset", "dispersion", "none"]
"""scalar: the paper's code. offset: |sum_j b_j e_j|^2. dispersion: what bounds the gap. none."""


@dataclass(frozen=True, slots=True)
class Offsets:
    """What the experts' offsets e_j = theta_j - mean(theta) come to."""

    products: Tensor
    """<e_j, e_k> over the mean of |e|^2, [K, K], float64."""

    sums: Tensor
    """The sum of each offset's coordinates, z-scored over the experts, [K], float64."""

    def penalty(self, kind: Penalty, coefficients: Tensor) -> Tensor:
        """Return the penalty of each sample's coefficients [N, K], as [N].

        scalar: (sum_j b_j s_j)^2, s the z-scored sums (papers.md 2.4, as released). offset:
        b' G b, which is |sum_j b_j e_j|^2 exactly. dispersion: sum_j b_j G_jj - b' G b, half of
        which times the Hessian's norm bounds the gap between ensemble and merge (papers.md 2.2).
        """
        if kind == "none":
            return torch.zeros(len(coefficients), dtype=coefficients.dtype)
        if kind == "scalar":
            return (coefficients @ self.sums.to(coefficients.dtype)).square()
        products = self.products.to(coefficients.dtype)
        merged = ((coefficients @ products) * coefficients).sum(-1)
        return merged if kind == "offset" else coefficients @ products.diagonal() - merged


def offsets(plan: Plan) -> Offsets:
    """Return the offsets of a plan's experts over every tensor that is merged, in one reading."""
    count = len(plan.experts)
    products = torch.zeros(count, count, dtype=torch.float64)
    sums = torch.zeros(count, dtype=torch.float64)
    for task in plan.tasks.values():
        if task.copied_from is not None:
            continue
        for start in range(0, task.spec.numel, BLOCK):
            block = Block(task, start, min(start + BLOCK, task.spec.numel))
            stack = torch.stack(
                [read(expert, task.name, block).double() for expert in plan.experts]
            )
            apart = stack - stack.mean(0)
            products += apart @ apart.T
            sums += apart.sum(1)
    scale = float(products.diagonal().mean())
    spread = float(sums.std()) if count > 1 else 0.0
    return Offsets(
        products / scale if scale else products,
        (sums - sums.mean()) / spread if spread else torch.zeros_like(sums),
    )
