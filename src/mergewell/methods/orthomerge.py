"""Merge what each expert rotates and what it adds apart from each other (OrthoMerge)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import (
    InnerMethod,
    MatrixMerge,
    TaskMatrices,
    alone,
    cannot_run_alone,
    sums_up,
)
from mergewell.methods import ops
from mergewell.methods.base import Laws

_RIDGE = 1e-5


class Orthomerge(MatrixMerge):
    """Merge what each expert rotates and what it adds apart from each other (OrthoMerge).

    theta_k = R_k theta_0 + rho_k with the rotation R_k = polar(theta_k theta_0'), on the shorter
    side. The rotations' Cayley forms Q_k = (R_k - 1) (R_k + 1)^-1 are averaged to Q and Q is given
    their mean norm; theta = (1 + Q) (1 - Q)^-1 theta_0 + the rho_k merged by `of`.

    Paper: Yang et al. 2026, "OrthoMerge", arXiv:2602.05943 (read in another's implementation).
    Departures: R_k comes from theta_k theta_0' plus 1e-5 of its largest singular value, so that it
    stays the identity where theta_0 has nothing to rotate. The conflict-aware form is not made.
    Coefficients multiply Q_k and rho_k. What is no matrix is averaged.
    """

    paper: ClassVar[str] = "arXiv:2602.05943"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6)
    }
    laws: ClassVar[Laws] = Laws(
        translation="Rotations are about the origin.",
        neutral={"scale": 1.0, "of": {"name": "task_arithmetic", "scale": 1.0, "divide": "count"}},
    )

    of: InnerMethod = sums_up(0.3)
    """The method that merges what is no rotation, such as {name: ties, scale: 0.5}."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return what rotating and adding changes about the base."""
        turned = matrices.shape[0] > matrices.shape[1]
        base = matrices.base.T if turned else matrices.base
        wide = base.to(torch.float64)
        skews: list[Tensor] = []
        rests: list[Tensor] = []
        for coefficient, expert in zip(matrices.coefficients, matrices.experts, strict=True):
            seen = (expert.T if turned else expert).to(torch.float64)
            skew = _skew(seen, wide)
            skews.append(float(coefficient) * skew)
            rests.append(seen - wide - _rotated(skew, wide))
        mean = ops.total(skews) / len(skews)
        norm = linalg.frobenius(mean)
        lengths = sum(linalg.frobenius(skew) for skew in skews) / len(skews)
        # rotations that cancel leave rounding, which must not be given their length
        cancel = norm <= linalg.NOISE * lengths
        change = _rotated(mean if cancel else mean * (lengths / norm), wide)
        experts = tuple(
            matrices.base + (rest.T if turned else rest).to(matrices.base.dtype) for rest in rests
        )
        rest = alone(self.of, replace(matrices, experts=experts)) - matrices.base
        return rest + (change.T if turned else change).to(rest.dtype)

    def objection(self, coefficients: Sequence[float]) -> str:
        """Return what `of` says, or that it asks for what is only known of whole experts."""
        return self.of.objection(coefficients) or cannot_run_alone(self.of)


def _skew(expert: Tensor, base: Tensor) -> Tensor:
    """Return the Cayley form (R - 1) (R + 1)^-1 of the rotation from base to expert, [O, O]."""
    one = torch.eye(len(base), dtype=base.dtype, device=base.device)
    if torch.equal(expert, base):
        return torch.zeros_like(one)
    product = expert @ base.T
    ridge = _RIDGE * float(cast("Tensor", torch.linalg.matrix_norm(product, 2)))
    rotation = linalg.polar(product + ridge * one, "full")
    skew = cast("Tensor", torch.linalg.solve(rotation + one, rotation - one, left=False))
    return (skew - skew.T) / 2


def _rotated(skew: Tensor, base: Tensor) -> Tensor:
    """Return (R - 1) theta_0 for the rotation R = (1 + Q) (1 - Q)^-1, as 2 (1 - Q)^-1 Q theta_0."""
    one = torch.eye(len(base), dtype=base.dtype, device=base.device)
    return 2 * cast("Tensor", torch.linalg.solve(one - skew, skew @ base))
