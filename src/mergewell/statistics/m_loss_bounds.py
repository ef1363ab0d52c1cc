"""Upper bounds of M-Loss from the spread of the experts, with and without data.

Shapes: K experts, O nodes, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mergewell.statistics.gaussian import Law

_KINKED = {"relu": 1.0, "relu6": 1.0, "leaky_relu": 1.0}
"""Activations whose slope jumps, with the size of the jump (less `slope` for LeakyReLU)."""


def gap_bound(law: Law, spread: Tensor) -> Tensor:
    """Return a bound of E|gap| for each node, given its spread E Var_j z, [O].

    Of a function with a bounded second derivative: sup|f''| / 2 times the spread. Of ReLU and its
    kin, where the gap is half the jump of slope times (mean_j |z_j| - |z_mean|): half the jump
    times the root of the spread. The variance is over models; coefficients are probabilities.

    Source: papers.md 1.3.3 (a); the form for ReLU follows from (b) by |z_j| - |z| <= |z_j - z|.
    """
    if law.name in _KINKED:
        jump = _KINKED[law.name] - law.slope
        # ReLU6 bends twice, once each way; the sum of two such bounds holds
        return (2 if law.name == "relu6" else 1) * abs(jump) / 2 * spread.clamp(min=0).sqrt()
    return largest_bend(law.function) / 2 * spread


def largest_bend(function: Callable[[Tensor], Tensor]) -> float:
    """Return sup|f''| of a smooth function, from second differences on [-20, 20], to about 1e-5."""
    step = 1e-3
    points = torch.arange(-20.0, 20.0, step, dtype=torch.float64)
    return float(function(points).diff(n=2).abs().max()) / step**2


def row_spread(
    matrices: Sequence[Tensor], coefficients: Sequence[float], second_moment: Tensor | None = None
) -> Tensor:
    """Return tr(C_i S) for each node, C_i the covariance over models of row i, [O], float64.

    matrices: K times [O, I]; second_moment: S = E h h^T, [I, I], or None for the identity, which
    needs no data. With the S of the data this is E Var_j z of a layer without bias; append a column
    of biases to the matrices and a 1 to h to cover these.

    Source: papers.md 1.3.3 (a).
    """
    first, *others = matrices
    total = torch.zeros(first.shape[0], dtype=torch.float64)
    mean = torch.zeros(first.shape, dtype=torch.float64)
    moment = None if second_moment is None else second_moment.to(torch.float64)

    def size(rows: Tensor) -> Tensor:
        return ((rows if moment is None else rows @ moment) * rows).sum(1)

    for share, matrix in zip(coefficients[1:], others, strict=True):
        difference = matrix.to(torch.float64) - first.to(torch.float64)
        total += share * size(difference)
        mean += share * difference
    return total - size(mean)


def dispersion(tensors: Sequence[Tensor], coefficients: Sequence[float]) -> float:
    """Return V = sum_j c_j ||theta_j - theta_mean||^2 of one tensor of every model.

    V adds up over tensors. The gap of the whole network is at most beta / 2 times its V, beta the
    largest curvature of the network in its parameters. Source: papers.md 1.3.3 (c).
    """
    rows = [tensor.reshape(1, -1) for tensor in tensors]
    return float(row_spread(rows, coefficients).sum())
