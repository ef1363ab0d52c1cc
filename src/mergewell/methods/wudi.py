"""Find the task matrix that disturbs each expert least where its own change points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from mergewell import linalg
from mergewell.matrices import MatrixMerge, TaskMatrices
from mergewell.methods.base import Laws

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # of Adam


class Wudi(MatrixMerge):
    """Find the task matrix that disturbs each expert least where its own change points.

    Rows of a task matrix M_k = c_k (theta_k - theta_0) lie in the span of the layer's inputs, so
    sum_k ||(D - M_k) M_k'||^2 / ||M_k||^2 is made small, near the start A = sum_k M_k.

    Paper: Cheng et al. 2025, "Whoever started the interference", arXiv:2503.08099, section 4.
    Departures: the paper stops Adam after 300 steps from A (solver="iterative"), which cost 300
    products O x I x I. By default the same is solved in closed form with a penalty for leaving A:
    D = A + (B - A C) (C + mu)^-1, C = sum_k M_k' M_k / ||M_k||^2, B = sum_k M_k M_k' M_k /
    ||M_k||^2, mu = anchor * mean eigenvalue of C. Anchor 0 would be the exact minimum, which is
    not the aim. All matrices are merged so, not attention and MLP alone; the rest is averaged.
    """

    paper: ClassVar[str] = "arXiv:2503.08099"
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "anchor": (0.01, 0.1, 1.0),
        "scale": (0.2, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25, 1.6, 2.0, 2.6),
    }
    laws: ClassVar[Laws] = Laws(
        equal_experts="K equal experts start from K times one, and are not let go all the way.",
        scale="Adam's steps have an absolute size.",
        neutral={"scale": 1.0},
    )

    solver: Literal["anchored", "iterative"] = "anchored"
    """Solve in closed form near the sum, or take `steps` steps of Adam from it (paper)."""

    anchor: Annotated[float, Field(gt=0)] = 3.0
    """anchored: how much staying near the sum counts, against the mean eigenvalue of C. On the
    demo's four image experts 3 gives what the paper's iterations give, and 0.1 is too little."""

    steps: Annotated[int, Field(ge=0)] = 300
    """iterative: steps of Adam."""

    step_size: Annotated[float, Field(gt=0)] = 1e-5
    """iterative: Adam's learning rate, in units of the weights."""

    def combine(self, matrices: TaskMatrices) -> Tensor:
        """Return the task matrix with little interference."""
        start = matrices.total()
        sides = start.shape[1]
        curve = torch.zeros(sides, sides, dtype=torch.float64, device=start.device)
        pull = torch.zeros_like(start)
        for matrix in matrices:
            square = linalg.frobenius(matrix) ** 2
            if square > 0:
                own = linalg.gram(matrix) / square
                curve += own
                pull += matrix @ own.to(matrix.dtype)
        if self.solver == "iterative":
            return self._iterated(start, pull, curve.to(start.dtype))
        mu = self.anchor * float(curve.diagonal().mean())
        if mu == 0:
            return start
        slope = pull - start @ curve.to(start.dtype)
        curve.diagonal().add_(mu)
        factor = cast("Tensor", torch.linalg.cholesky(curve))
        step = torch.cholesky_solve(slope.T.to(torch.float64), factor).T
        return start + step.to(start.dtype)

    def _iterated(self, start: Tensor, pull: Tensor, curve: Tensor) -> Tensor:
        """Return `start` after Adam's steps down the gradient 2 (D C - B)."""
        merged, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, self.steps + 1):
            slope = 2 * (merged @ curve - pull)
            mean = _BETAS[0] * mean + (1 - _BETAS[0]) * slope
            square = _BETAS[1] * square + (1 - _BETAS[1]) * slope.square()
            rate = self.step_size / (1 - _BETAS[0] ** step)
            root = (square / (1 - _BETAS[1] ** step)).sqrt()
            merged = merged - rate * mean / (root + _EPSILON)
        return merged
