"""Closed forms of the expected M-Loss gap under a Gaussian model of the pre-activations.

Model: z_1 .. z_K are exchangeable Gaussians of one mean, variance s^2 and correlation rho between
models (1 when the experts are equal). The gap is sum_j c_j f(z_j) - f(sum_j c_j z_j). Everything is
in float64 and broadcasts. Source: papers.md 1.3.2, derived there; general coefficients are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Number = float | Tensor


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
    concentration = _double(1.0 / experts if experts else 0.0)
    if coefficients is not None:
        concentration = _double(coefficients).square().sum()
    rho = _double(correlation)
    return _double(variance) * (rho + (1 - rho) * concentration)


def expected_relu_gap(variance: Number, merged: Number, *, mean: Number = 0.0) -> Tensor:
    """Return E[gap] of ReLU: E relu at (mean, s^2) minus the same at (mean, v).

    With mean 0 it is s / sqrt(2 pi) (1 - sqrt(v / s^2)). `merged` is v, see `merged_variance`.
    """
    return _difference(_mean_relu, variance, merged, mean)


def expected_leaky_relu_gap(
    variance: Number, merged: Number, *, slope: Number, mean: Number = 0.0
) -> Tensor:
    """Return E[gap] of LeakyReLU: (1 - slope) times that of ReLU."""
    return (1 - _double(slope)) * expected_relu_gap(variance, merged, mean=mean)


def expected_gelu_gap(variance: Number, merged: Number, *, mean: Number = 0.0) -> Tensor:
    """Return E[gap] of the exact GELU: E gelu at (mean, s^2) minus the same at (mean, v).

    With mean 0 it is (s^2 / sqrt(1 + s^2) - v / sqrt(1 + v)) / sqrt(2 pi).
    """
    return _difference(_mean_gelu, variance, merged, mean)


def expected_squared_relu_gap_of_two(variance: Number, correlation: Number) -> Tensor:
    """Return E[gap^2] of ReLU for two equally weighted experts of mean 0, exactly.

    s^2 (alpha - sin alpha) / (4 pi) with alpha = arccos(rho).
    """
    angle = _double(correlation).arccos()
    exact = angle - angle.sin()
    # near 0 the difference cancels: the first terms of its series are then better
    series = angle**3 / 6 * (1 - angle.square() / 20 * (1 - angle.square() / 42))
    return _double(variance) * torch.where(angle < 0.05, series, exact) / (4 * math.pi)


def expected_squared_gelu_gap(variance: Number, correlation: Number, *, experts: int) -> Tensor:
    """Return E[gap^2] of GELU to leading order in 1 - rho, equal coefficients, mean 0.

    s^4 (1 - rho)^2 (K^2 - 1) / K^2 (4 - 4u + 3u^2) / sqrt(1 + 2v) / (8 pi), u = v / (1 + 2v).
    """
    v = merged_variance(variance, correlation, experts=experts)
    u = v / (1 + 2 * v)
    spread = (_double(variance) * (1 - _double(correlation))).square()
    many = 1 - 1 / experts**2
    return spread * many * (4 - 4 * u + 3 * u.square()) / (1 + 2 * v).sqrt() / (8 * math.pi)


def _difference(
    expectation: Callable[[Tensor, Tensor], Tensor],
    variance: Number,
    merged: Number,
    mean: Number,
) -> Tensor:
    mu = _double(mean)
    return expectation(mu, _double(variance)) - expectation(mu, _double(merged))


def _mean_relu(mean: Tensor, variance: Tensor) -> Tensor:
    """Return E relu(z) = mu Phi(mu / s) + s phi(mu / s), the limit relu(mu) at s = 0."""
    spread = variance.sqrt()
    ratio = mean / spread.clamp(min=torch.finfo(torch.float64).tiny)
    return mean * _cdf(ratio) + spread * _density(ratio)


def _mean_gelu(mean: Tensor, variance: Tensor) -> Tensor:
    """Return E gelu(z) = mu Phi(m) + s^2 / sqrt(1 + s^2) phi(m), m = mu / sqrt(1 + s^2)."""
    scale = (1 + variance).sqrt()
    return mean * _cdf(mean / scale) + variance / scale * _density(mean / scale)


def _cdf(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)  # pyright: ignore[reportUnknownVariableType]


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _double(number: Number) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64)
