"""Expectations for any Gaussian against Monte Carlo, and theory read out of a statistic's state."""

import math

import pytest
import torch
import torch.nn.functional as F

from mergewell.statistics import m_loss as file
from mergewell.statistics.expected_m_loss import (
    expected_gap,
    expected_gated_gap,
    expected_gelu_gap,
    expected_squared_gap,
    expected_squared_gelu_gap,
    expected_squared_relu_gap_of_two,
    merged_variance,
)
from mergewell.statistics.gaussian import Law
from mergewell.statistics.m_loss import ActivationBatch, MLoss
from mergewell.statistics.m_loss_theory import Moments, theory_of

SAMPLES = 200_000
LAWS = {
    "relu": Law("relu", F.relu),
    "leaky_relu": Law("leaky_relu", lambda z: F.leaky_relu(z, 0.1), 0.1),
    "gelu": Law("gelu", F.gelu),
    "silu": Law("silu", F.silu),
}


def gaussian(experts: int, seed: int = 0, near: float = 0.4):
    """Return mean [K, 1], covariance [K, K, 1] of no symmetry, and samples [K, N, 1] of it."""
    generator = torch.Generator().manual_seed(100 * experts + seed)
    mean = 0.3 + 0.4 * torch.randn(experts, generator=generator, dtype=torch.float64)
    own = near * torch.randn(experts, experts, generator=generator, dtype=torch.float64)
    root = torch.cat([torch.full((experts, 1), 1.1, dtype=torch.float64), own], 1)
    noise = torch.randn(experts + 1, SAMPLES, generator=generator, dtype=torch.float64)
    z = mean[:, None] + root @ noise
    return mean[:, None], (root @ root.T)[..., None], z[..., None]


def shares_of(experts: int) -> list[float]:
    total = experts * (experts + 1) / 2
    return [(index + 1) / total for index in range(experts)]


def within(value: torch.Tensor, wanted: torch.Tensor, errors: float = 3.0) -> bool:
    """Whether the mean over samples is within standard errors of what is wanted, and telling."""
    error = float(value.std()) / math.sqrt(len(value))
    assert error < 0.05 * abs(float(wanted))
    return abs(float(value.mean()) - float(wanted)) < errors * error


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("experts", [2, 3, 8])
def test_gap_and_squared_gap_of_any_gaussian(name: str, experts: int) -> None:
    mean, covariance, z = gaussian(experts)
    law, shares = LAWS[name], torch.tensor(shares_of(experts), dtype=torch.float64)
    ensemble = torch.einsum("k,kno->no", shares, law.function(z))
    gap = (ensemble - law.function(torch.einsum("k,kno->no", shares, z)))[:, 0]
    assert within(gap, expected_gap(law, mean, covariance, shares))
    assert within(gap.square(), expected_squared_gap(law, mean, covariance, shares))


@pytest.mark.parametrize("name", LAWS)
def test_the_squared_gap_of_near_experts_keeps_its_digits(name: str) -> None:
    """Small gaps are differences of large numbers; two ways to scale them must agree."""
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    mean = torch.zeros(2, 1, dtype=torch.float64)
    found = []
    for rho in (1 - 1e-3, 1 - 1e-4):
        covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)[..., None]
        found.append(float(expected_squared_gap(LAWS[name], mean, covariance, half)))
    order = 1.5 if "relu" in name else 2  # papers.md 1.3.2
    assert math.log10(found[0] / found[1]) == pytest.approx(order, abs=0.01)


def test_closed_forms_for_exchangeable_experts_are_special_cases() -> None:
    def exchangeable(experts: int, rho: float):
        eye = torch.eye(experts, dtype=torch.float64)
        covariance = (1.69 * (rho + (1 - rho) * eye))[..., None]
        mean = torch.zeros(experts, 1, dtype=torch.float64)
        return mean, covariance, torch.full((experts,), 1 / experts, dtype=torch.float64)

    for rho in (0.0, 0.5, 0.99):
        found = expected_squared_gap(LAWS["relu"], *exchangeable(2, rho))
        wanted = expected_squared_relu_gap_of_two(1.69, rho)
        torch.testing.assert_close(found[0], wanted, rtol=1e-6, atol=0)
    found = expected_squared_gap(LAWS["gelu"], *exchangeable(8, 0.9999))
    wanted = expected_squared_gelu_gap(1.69, 0.9999, experts=8)
    torch.testing.assert_close(found[0], wanted, rtol=2e-3, atol=0)
    found = expected_gap(LAWS["gelu"], *exchangeable(3, 0.7))
    merged = merged_variance(1.69, 0.7, experts=3)
    torch.testing.assert_close(found[0], expected_gelu_gap(1.69, merged), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("experts", [2, 3, 8])
def test_gated_gap(name: str, experts: int) -> None:
    mean, covariance, both = gaussian(2 * experts, near=0.25)
    law, shares = LAWS[name], torch.tensor(shares_of(experts), dtype=torch.float64)
    g, u = both[:experts], both[experts:]
    wanted = expected_gated_gap(
        law,
        mean[:experts],
        covariance[:experts, :experts],
        factor_mean=mean[experts:],
        cross=covariance[:experts, experts:],
        coefficients=shares,
    )
    ensemble = torch.einsum("k,kno->no", shares, law.function(g) * u)
    middle = [torch.einsum("k,kno->no", shares, part) for part in (g, u)]
    assert within((ensemble - law.function(middle[0]) * middle[1])[:, 0], wanted)


def test_moments_are_those_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    g, u = torch.randn(3, 50, 4, dtype=torch.float64), torch.randn(3, 50, 4, dtype=torch.float64)
    shares = [0.5, 0.2, 0.3]
    c = torch.tensor(shares, dtype=torch.float64)

    def seen(rows: slice):
        pairs = list(zip(g[:, rows], u[:, rows], strict=True))
        return MLoss().update({}, ActivationBatch(pairs, shares, lambda a, b: a * b, -1))

    state = MLoss().join(seen(slice(20)), seen(slice(20, None)))
    found = Moments.of(state)
    assert found is not None and found.factor_mean is not None and found.cross is not None
    torch.testing.assert_close(found.mean, g.mean(1))
    torch.testing.assert_close(found.factor_mean, u.mean(1))
    away, other = g - g.mean(1, keepdim=True), u - u.mean(1, keepdim=True)
    torch.testing.assert_close(found.covariance, torch.einsum("ino,jno->ijo", away, away) / 50)
    torch.testing.assert_close(found.cross, torch.einsum("ino,jno->ijo", away, other) / 50)
    middle = torch.einsum("k,kno->no", c, g)
    spread = torch.einsum("k,kno->no", c, (g - middle).square()).mean(0)
    torch.testing.assert_close(found.spread, spread)
    torch.testing.assert_close(found.coefficients, c)
    monkeypatch.setattr(file, "BLOCK", 20)  # 10 blocks of 5 rows, of which 3 are used
    used = Moments.of(seen(slice(None)))
    rows = [r for start in (0, 20, 40) for r in range(start, start + 5)]
    assert used is not None
    torch.testing.assert_close(used.mean, g[:, rows].mean(1))


def test_the_spread_between_near_experts_survives_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 30 + torch.randn(1, 4000, 3, generator=generator).repeat(2, 1, 1)
    z[1] += 1e-4 * torch.randn(4000, 3, generator=generator)
    state = MLoss().update({}, ActivationBatch(z, [0.5, 0.5], F.gelu, -1))
    found = Moments.of(state)
    wanted = (z[1].double() - z[0].double()).square().mean(0) / 4
    assert found is not None
    torch.testing.assert_close(found.spread, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LAWS)
def test_measured_and_expected_meet_on_gaussians_and_part_elsewhere(name: str) -> None:
    law = LAWS[name]
    mean, _, z = gaussian(3)
    shares = shares_of(3)
    state = MLoss().update({}, ActivationBatch(list(z), shares, law.function, -1))
    theory = theory_of(state, [(law.name, law.function, law.slope)])
    assert theory is not None and theory.ratio == pytest.approx(1, abs=0.05)
    assert theory.agreement == pytest.approx(1, abs=1e-9)
    assert theory.bound is not None and theory.expected_gap is not None
    assert (theory.bound >= (state["gap"] / SAMPLES).abs()).all()
    # the same means and covariances, but no value near the kink or the bend
    signs = torch.where(z[0] > mean[0], 1.0, -1.0)
    far = [6 * signs + 0.01 * part for part in z]
    state = MLoss().update({}, ActivationBatch(far, shares, law.function, -1))
    theory = theory_of(state, [(law.name, law.function, law.slope)])
    assert theory is not None and theory.ratio is not None and theory.ratio < 0.5


def test_exchangeable_summaries() -> None:
    covariance = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)[..., None]
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    found = Moments(half, zero, covariance, torch.zeros(1))
    assert float(found.variance) == 2 and float(found.correlation) == 0.5


def test_theory_is_silent_where_it_knows_nothing() -> None:
    z = torch.randn(2, 30, 3)
    state = MLoss().update({}, ActivationBatch(list(z), [0.5, 0.5], torch.sin, -1))
    theory = theory_of(state, [("custom", torch.sin, 0.0)])
    assert theory is not None and theory.expected_gap is None and theory.ratio is None
    assert theory.bound is not None  # sin'' is at most 1
    torch.testing.assert_close(theory.bound, theory.moments.spread / 2, rtol=1e-3, atol=0)
    given = ActivationBatch(list(z), [0.5, 0.5], F.relu, -1, merged=z[0])
    assert theory_of(MLoss().update({}, given), [("relu", F.relu, 0.0)]) is None
    equal = ActivationBatch([z[0], z[0]], [0.5, 0.5], F.relu, -1)
    theory = theory_of(MLoss().update({}, equal), [("relu", F.relu, 0.0)])
    assert theory is not None and theory.bound is not None and theory.bound.eq(0).all()
