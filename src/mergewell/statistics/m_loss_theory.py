"""Theory beside measurement: what a Gaussian model expects of a unit, and what bounds allow.

Shapes: K experts, O nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergewell.statistics.base import State
from mergewell.statistics.expected_m_loss import expected_gap, expected_gated_gap
from mergewell.statistics.gaussian import Law
from mergewell.statistics.m_loss import moment_pairs
from mergewell.statistics.m_loss_bounds import gap_bound

Described = tuple[str, Callable[[Tensor], Tensor], float]
"""A branch's function: its name, the function, its slope."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and covariance over observations of what K experts' layers give at each node."""

    coefficients: Tensor
    """[K], float64."""
    mean: Tensor
    """[K, O]."""
    covariance: Tensor
    """[K, K, O]."""
    spread: Tensor
    """E Var_j z, the variance over models with the coefficients as probabilities, [O]."""
    factor_mean: Tensor | None = None
    """Of gated units: mean of what the gate multiplies, [K, O]."""
    cross: Tensor | None = None
    """Of gated units: covariance of gate i with factor j, [K, K, O]."""

    @classmethod
    def of(cls, state: State) -> Moments | None:
        """Return the moments in a state of `MLoss`; None where none were gathered."""
        if "product" not in state:
            return None
        observations = state["coefficients"].sum()  # the coefficients themselves sum to 1
        if float(observations) == 0:
            return None
        coefficients = state["coefficients"] / observations
        experts = len(coefficients)
        basis = state["sum"] / observations
        factors = len(basis) // experts
        # the basis is z_0 and the differences to it; this matrix gives back the z_j
        back = torch.eye(experts, dtype=torch.float64)
        back[:, 0] = 1
        second = torch.zeros(len(basis), len(basis), basis.shape[1], dtype=torch.float64)
        pairs = moment_pairs(experts, factors)
        for (i, j), product in zip(pairs, state["product"] / observations, strict=True):
            second[i, j] = second[j, i] = product
        centred = second - basis[:, None] * basis[None]
        gates = centred[:experts, :experts]
        covariance = torch.einsum("ai,bj,ijo->abo", back, back, gates)
        # the first difference, of z_0 to itself, is 0 and has no say in the spread
        c, away = coefficients[1:], second[1:experts, 1:experts]
        spread = torch.einsum("i,iio->o", c, away) - torch.einsum("i,j,ijo->o", c, c, away)
        mean = back @ basis[:experts]
        if factors == 1:
            return cls(coefficients, mean, covariance, spread.clamp(min=0))
        across = torch.einsum("ai,bj,ijo->abo", back, back, centred[:experts, experts:])
        factor_mean = back @ basis[experts:]
        return cls(coefficients, mean, covariance, spread.clamp(min=0), factor_mean, across)

    @property
    def variance(self) -> Tensor:
        """Mean over experts of the variance, s^2 of the exchangeable model, [O]."""
        return torch.einsum("k,kko->o", self.coefficients, self.covariance)

    @property
    def correlation(self) -> Tensor:
        """Mean correlation between two experts, rho of the exchangeable model, [O]; 1 for K = 1."""
        c = self.coefficients
        merged = torch.einsum("i,j,ijo->o", c, c, self.covariance)
        alone = c.square().sum()
        ratio = merged / self.variance.clamp(min=torch.finfo(torch.float64).tiny)
        return (ratio - alone) / (1 - alone) if alone < 1 else torch.ones_like(ratio)


@dataclass(frozen=True, slots=True)
class Theory:
    """What theory says of one unit, beside what was measured."""

    moments: Moments

    expected_gap: Tensor | None
    """Mean gap under Gaussians with the measured means and covariances, [O]; None for functions
    of which no expectation is known."""

    bound: Tensor | None
    """Bound of the mean absolute gap from the measured spread, [O]; None for gated units."""

    ratio: float | None
    """Norm of the measured mean gaps over that of the expected ones: near 1 where the Gaussian
    model holds; None where nothing is expected."""

    agreement: float | None
    """Cosine of measured and expected mean gaps over the nodes: 1 where the pattern is foretold."""


def theory_of(state: State, functions: Sequence[Described]) -> Theory | None:
    """Return what theory says of a finished state of `MLoss`.

    `functions` are those of the unit's branches: the gate's first. None without moments (module
    units, merged sides that are not the experts' mean) and for more than two branches.
    """
    moments = Moments.of(state)
    if moments is None or not functions:
        return None
    law = Law(*functions[0])
    expected = bound = None
    if len(functions) == 1:
        bound = gap_bound(law, moments.spread)
        if law.is_known:
            c = moments.coefficients
            expected = expected_gap(law, moments.mean, moments.covariance, c)
    elif functions[1][0] == "identity" and law.is_known:
        assert moments.factor_mean is not None and moments.cross is not None
        expected = expected_gated_gap(
            law,
            moments.mean,
            moments.covariance,
            factor_mean=moments.factor_mean,
            cross=moments.cross,
            coefficients=moments.coefficients,
        )
    measured = state["gap"] / state["observations"]
    ratio = agreement = None
    if expected is not None and _norm(expected) > 0:
        ratio = _norm(measured) / _norm(expected)
        if ratio > 0:
            agreement = float(measured @ expected) / _norm(measured) / _norm(expected)
    return Theory(moments, expected, bound, ratio, agreement)


def _norm(values: Tensor) -> float:
    return float(values.square().sum().sqrt())
