"""Closed forms of the expected M-Loss gap under a Gaussian model of the pre-activations.

The gap is sum_j c_j f(z_j) - f(sum_j c_j z_j). `expected_gap`, `expected_gated_gap` and
`expected_squared_gap` take any Gaussian. The other forms are for z_1 .. z_K exchangeable: one mean,
variance s^2 and correlation rho between models (1 when the experts are equal). Everything is in
float64 and broadcasts. Source: papers.md 1.3.2, derived there; any means, covariances, coefficients
and gated units are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mergewell.statistics.gaussian import Law, Number, density, double, mean_gelu, mean_relu


def merged_variance(
    variance: Number,
    correlation: Number,
    *,
    experts: int | None = None,
    coefficients: Tensor | None = None,
) -> Tensor:
    """Return v, the variance of the mean pre-activation of K experts.

    v = s^2 (rho + (1 - rho) sum_j c_j^2); with equal coefficients the sum is 1/K.

    Raises:
        ValueError: not exactly one of `experts` and `coefficients` is given.
    """
    if (experts is None) == (coefficients is None):
        raise ValueError("Give the number of experts or their coefficients, not both.")
    concentration = double(1.0 / experts if experts else 0.0)
    if coefficients is not None:
        concentration = double(coefficients).square().sum()
    rho = double(correlation)
    return double(variance) * (rho + (1 - rho) * concentration)


def expected_relu_gap(variance: Number, merged: Number, *, mean: Number = 0.0) -> Tensor:
    """Return E[gap] of ReLU: E relu at (mean, s^2) minus the same at (mean, v).

    With mean 0 it is s / sqrt(2 pi) (1 - sqrt(v / s^2)). `merged` is v, see `merged_variance`.
    """
    return _difference(mean_relu, variance, merged, mean)


def expected_leaky_relu_gap(
    variance: Number, merged: Number, *, slope: Number, mean: Number = 0.0
) -> Tensor:
    """Return E[gap] of LeakyReLU: (1 - slope) times that of ReLU."""
    return (1 - double(slope)) * expected_relu_gap(variance, merged, mean=mean)


def expected_gelu_gap(variance: Number, merged: Number, *, mean: Number = 0.0) -> Tensor:
    """Return E[gap] of the exact GELU: E gelu at (mean, s^2) minus the same at (mean, v).

    With mean 0 it is (s^2 / sqrt(1 + s^2) - v / sqrt(1 + v)) / sqrt(2 pi).
    """
    return _difference(mean_gelu, variance, merged, mean)


def expected_squared_relu_gap_of_two(variance: Number, correlation: Number) -> Tensor:
    """Return E[gap^2] of ReLU for two equally weighted experts of mean 0, exactly.

    s^2 (alpha - sin alpha) / (4 pi) with alpha = arccos(rho).
    """
    angle = double(correlation).arccos()
    exact = angle - angle.sin()
    # near 0 the difference cancels: the first terms of its series are then better
    series = angle**3 / 6 * (1 - angle.square() / 20 * (1 - angle.square() / 42))
    return double(variance) * torch.where(angle < 0.05, series, exact) / (4 * math.pi)


def expected_squared_gelu_gap(variance: Number, correlation: Number, *, experts: int) -> Tensor:
    """Return E[gap^2] of GELU to leading order in 1 - rho, equal coefficients, mean 0.

    s^4 (1 - rho)^2 (K^2 - 1) / K^2 (4 - 4u + 3u^2) / sqrt(1 + 2v) / (8 pi), u = v / (1 + 2v).
    """
    v = merged_variance(variance, correlation, experts=experts)
    u = v / (1 + 2 * v)
    spread = (double(variance) * (1 - double(correlation))).square()
    many = 1 - 1 / experts**2
    return spread * many * (4 - 4 * u + 3 * u.square()) / (1 + 2 * v).sqrt() / (8 * math.pi)


def expected_gap(law: Law, mean: Tensor, covariance: Tensor, coefficients: Tensor) -> Tensor:
    """Return E[gap] for any Gaussian: sum_j c_j E f(z_j) - E f(sum_j c_j z_j).

    mean: [K, ...]; covariance: [K, K, ...]; coefficients: [K]; result: [...].

    Raises:
        ValueError: no expectation of the activation is known.
    """
    c = double(coefficients)
    variance = torch.einsum("kk...->k...", covariance).clamp(min=0)
    middle = _mean(c, mean)
    merged = torch.einsum("i,j,ij...->...", c, c, covariance).clamp(min=0)
    return _mean(c, law.mean(mean, variance)) - law.mean(middle, merged)


def expected_gated_gap(
    law: Law,
    mean: Tensor,
    covariance: Tensor,
    *,
    factor_mean: Tensor,
    cross: Tensor,
    coefficients: Tensor,
) -> Tensor:
    """Return E[gap] of gated units f(g) u: sum_j c_j E f(g_j) u_j - E f(g_mean) u_mean.

    By Stein's lemma E f(g) u = E u E f(g) + Cov(g, u) E f'(g). mean, covariance: of the gates, see
    `expected_gap`; factor_mean: of u, [K, ...]; cross: Cov(g_i, u_j), [K, K, ...].

    Raises:
        ValueError: no expectation of the activation is known.
    """
    c = double(coefficients)
    variance = torch.einsum("kk...->k...", covariance).clamp(min=0)
    own = factor_mean * law.mean(mean, variance)
    own = own + torch.einsum("kk...->k...", cross) * law.slope_mean(mean, variance)
    middle, merged = _mean(c, mean), torch.einsum("i,j,ij...->...", c, c, covariance)
    merged = merged.clamp(min=0)
    joint = torch.einsum("i,j,ij...->...", c, c, cross)
    both = _mean(c, factor_mean) * law.mean(middle, merged)
    return _mean(c, own) - both - joint * law.slope_mean(middle, merged)


def expected_squared_gap(
    law: Law, mean: Tensor, covariance: Tensor, coefficients: Tensor
) -> Tensor:
    """Return E[gap^2] for any Gaussian, by quadrature that is exact to about 1e-12 E f^2.

    E gap^2 expands into E f(x) f(y) of pairs of experts and their mean. Of each pair, y given x is
    integrated by `Law.mean` and x by Gauss-Legendre panels that are refined where f or the inner
    integral bends. Shapes as in `expected_gap`. Memory: about 300 numbers a node, times 257 where
    `Law.mean` is itself a quadrature.

    Raises:
        ValueError: no expectation of the activation is known.
    """
    c = double(coefficients)
    experts = len(c)
    # the mean joins the experts as one more variable, with the coefficient -1
    middle = _mean(c, mean)[None]
    with_middle = _mean(c, covariance)
    corner = _mean(c, with_middle)[None]
    means = torch.cat([mean, middle])
    table = [[covariance[i, j] for j in range(experts)] for i in range(experts)]
    for i in range(experts):
        table[i].append(with_middle[i])
    table.append([*with_middle.unbind(), corner[0]])
    signs = torch.cat([c, -c.new_ones(1)])
    total = torch.zeros_like(corner[0])
    for i in range(experts + 1):
        for j in range(i, experts + 1):
            moments = (means[i], means[j], table[i][i], table[j][j], table[i][j])
            total = total + (2 - (i == j)) * signs[i] * signs[j] * _pair(law, *moments)
    return total.clamp(min=0)


def _mean(coefficients: Tensor, values: Tensor) -> Tensor:
    """Return sum_k c_k x_k, [K, ...] to [...]."""
    return torch.einsum("k,k...->...", coefficients, values)


_PANEL = 16
"""Gauss-Legendre points a panel."""


def _pair(
    law: Law, mean_x: Tensor, mean_y: Tensor, var_x: Tensor, var_y: Tensor, joint: Tensor
) -> Tensor:
    """Return E f(x) f(y) of two jointly Gaussian variables."""
    tiny = torch.finfo(torch.float64).tiny
    spread = var_x.clamp(min=0).sqrt()
    lean = torch.where(spread > 0, joint / spread.clamp(min=tiny), 0.0)  # slope of E[y | t]
    left = (var_y - lean.square()).clamp(min=0)
    width = left.sqrt() / lean.abs().clamp(min=1e-9)
    bend_x, bend_y = -mean_x / spread.clamp(min=1e-9), -mean_y / _away(lean)
    steps = torch.tensor([-8.0, -4, -2, -1, 0, 1, 2, 4, 8], dtype=torch.float64)
    fixed = torch.tensor([-9.5, -6, -3, -1, 1, 3, 6, 9.5], dtype=torch.float64)
    edges = [fixed.expand(*mean_x.shape, -1)]
    if law.is_kinked or law.name == "relu6":
        shifts = [0.0] if law.is_kinked else [0.0, 6.0]
        for shift in shifts:
            x = bend_x + shift / spread.clamp(min=1e-9)
            y = bend_y + shift / _away(lean)
            edges += [x[..., None], y[..., None] + width[..., None] * steps]
    cuts = torch.cat(edges, -1).clamp(-9.5, 9.5).sort(-1).values
    low, high = cuts[..., :-1, None], cuts[..., 1:, None]
    nodes, weights = _legendre()
    t = ((low + high) / 2 + (high - low) / 2 * nodes).flatten(-2)
    weight = ((high - low) / 2 * weights).flatten(-2) * density(t)
    inner = law.mean(mean_y[..., None] + lean[..., None] * t, left[..., None].expand_as(t))
    return (law.function(mean_x[..., None] + spread[..., None] * t) * inner * weight).sum(-1)


def _away(lean: Tensor) -> Tensor:
    """Return slopes kept away from 0, with their signs."""
    return torch.where(lean.abs() < 1e-9, 1e-9, lean)


@cache
def _legendre() -> tuple[Tensor, Tensor]:
    nodes, weights = np.polynomial.legendre.leggauss(_PANEL)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def _difference(
    expectation: Callable[[Tensor, Tensor], Tensor],
    variance: Number,
    merged: Number,
    mean: Number,
) -> Tensor:
    mu = double(mean)
    return expectation(mu, double(variance)) - expectation(mu, double(merged))
