"""Search without gradients: an evolution strategy, and Bayesian optimisation.

Both are seeded, know nothing of merging, and call the judge once for each point. Shapes: D numbers
of a point, n points that are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor

Judge = Callable[[Tensor], float]
"""A number for a point, [D], float64."""

Acquisition = Literal["ei", "ucb"]
"""Expected improvement (by more than 0.01), or the upper confidence bound (2.576 deviations)."""

_IMPROVEMENT, _KAPPA = 0.01, 2.576
_NOISE = 1e-6
_CANDIDATES, _NEAR = 2048, 512
_UP, _DOWN = 0.8, -0.2  # log factors: in balance where one step of five succeeds


def evolve(
    judge: Judge, start: Tensor, *, low: float, high: float, budget: int, seed: int
) -> list[tuple[Tensor, float]]:
    """Return the points that were tried for the smallest judgement, in order, from `start` on.

    A (1+1) evolution strategy: a normal step from the best point, cut to [low, high]; the step
    grows where it succeeds and shrinks where it fails, from a length of a fifth of the range.

    Source: Rechenberg's one-fifth rule in the form of Kern et al. 2004 (doi
    10.1023/B:NACO.0000023416.59689.4e), section 3.
    """
    generator = torch.Generator().manual_seed(seed)
    best, value = start.clone(), judge(start)
    tried = [(best, value)]
    step = (high - low) / (5 * math.sqrt(len(start)))
    for _ in range(budget - 1):
        drawn = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        point = (best + step * drawn).clamp(low, high)
        found = judge(point)
        tried.append((point, found))
        success = found <= value
        step *= math.exp(_UP if success else _DOWN)
        if success:
            best, value = point, found
    return tried


def bayesian(
    judge: Judge, size: int, *, random: int, steps: int, acquisition: Acquisition, seed: int
) -> list[tuple[Tensor, float]]:
    """Return the points in [0, 1]^D that were tried for the largest judgement, in order.

    `random` points are drawn; then a Gaussian process (Matern 5/2, one length scale by maximum
    likelihood, judgements normalised) names `steps` more, each where the acquisition is largest
    among seeded candidates: drawn from the cube, and near the best point known.

    Source: Snoek et al. 2012, arXiv:1206.2944, section 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.rand(count, size, generator=generator, dtype=torch.float64)

    tried = [(point, judge(point)) for point in drawn(random)]
    for _ in range(steps):
        points = torch.stack([point for point, _ in tried])
        values = torch.tensor([value for _, value in tried], dtype=torch.float64)
        centre = points[int(values.argmax())]
        noise = torch.randn(_NEAR, size, generator=generator, dtype=torch.float64)
        widths = 10 ** (-3 * torch.rand(_NEAR, 1, generator=generator, dtype=torch.float64))
        near = (centre + 0.5 * widths * noise).clamp(0, 1)
        candidates = torch.cat([drawn(_CANDIDATES), near])
        mean, deviation = posterior(points, values, candidates)
        if acquisition == "ucb":
            wanted = mean + _KAPPA * deviation
        else:
            wanted = _expected_improvement(mean - values.max() - _IMPROVEMENT, deviation)
        point = candidates[int(wanted.argmax())]
        tried.append((point, judge(point)))
    return tried


def posterior(points: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return a Gaussian process's mean and deviation at `at` [m, D], given points [n, D].

    Results: [m] each, in the units of the values, [n].
    """
    centre = values.mean()
    spread = values.std(correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    known = (values - centre) / spread
    scales = [10 ** (exponent / 6) for exponent in range(-12, 7)]
    fits = [_fit(points, known, scale) for scale in scales]
    best = max(range(len(scales)), key=lambda place: fits[place][0])
    _, factor, weights = fits[best]
    cross = _matern(points, at, scales[best])  # [n, m]
    mean = cross.T @ weights
    half = cast("Tensor", torch.linalg.solve_triangular(factor, cross, upper=False))
    variance = (1 - half.square().sum(0)).clamp(min=1e-12)
    return centre + spread * mean, spread * variance.sqrt()


def _fit(points: Tensor, known: Tensor, scale: float) -> tuple[float, Tensor, Tensor]:
    """Return the log-likelihood, up to a constant, the factor of the covariance, and K^-1 y."""
    covariance = _matern(points, points, scale)
    covariance = covariance + _NOISE * torch.eye(len(points), dtype=torch.float64)
    factor = cast("Tensor", torch.linalg.cholesky(covariance))
    weights = torch.cholesky_solve(known[:, None], factor)[:, 0]
    likely = -0.5 * float(known @ weights) - float(factor.diagonal().log().sum())
    return likely, factor, weights


def _matern(left: Tensor, right: Tensor, scale: float) -> Tensor:
    distance = math.sqrt(5) * torch.cdist(left, right) / scale
    return (1 + distance + distance.square() / 3) * (-distance).exp()


def _expected_improvement(gain: Tensor, deviation: Tensor) -> Tensor:
    share = gain / deviation
    density = (-0.5 * share.square()).exp() / math.sqrt(2 * math.pi)
    chance = 0.5 * (1 + torch.erf(share / math.sqrt(2)))
    return gain * chance + deviation * density
