"""The closed forms against the statistic, fed with correlated Gaussian pre-activations."""

import math

import pytest
import torch
import torch.nn.functional as F

from mergewell.statistics.expected_m_loss import (
    expected_gelu_gap,
    expected_leaky_relu_gap,
    expected_relu_gap,
    expected_squared_gelu_gap,
    expected_squared_relu_gap_of_two,
    merged_variance,
)
from mergewell.statistics.m_loss import ActivationBatch, MLoss

SAMPLES = 200_000


def gaussians(experts: int, rho: float, *, s: float = 1.3, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * experts + int(100 * rho))
    shared = torch.randn(SAMPLES, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(experts, SAMPLES, 1, generator=generator, dtype=torch.float64)
    return mean + s * (math.sqrt(rho) * shared + math.sqrt(1 - rho) * own)


def measured(z: torch.Tensor, activation, shares=None) -> tuple[float, float, float, float]:
    """Return mean gap and mean squared gap, each with its standard error."""
    shares = shares or [1 / len(z)] * len(z)
    state = MLoss().update({}, ActivationBatch(z, shares, activation, node_dim=-1))
    value = MLoss().value(state)
    weights = torch.tensor(shares, dtype=torch.float64)[:, None, None]
    gap = (weights * activation(z)).sum(0) - activation((weights * z).sum(0))
    errors = gap.std() / SAMPLES**0.5, gap.square().std() / SAMPLES**0.5
    return float(value["mean_gap"]), float(errors[0]), float(value["node"]), float(errors[1])


def leaky(z: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(z, 0.1)


def expected(name: str, variance: float, v: torch.Tensor, mean: float) -> float:
    if name == "relu":
        return float(expected_relu_gap(variance, v, mean=mean))
    if name == "leaky":
        return float(expected_leaky_relu_gap(variance, v, slope=0.1, mean=mean))
    return float(expected_gelu_gap(variance, v, mean=mean))


ACTIVATIONS = {"relu": F.relu, "leaky": leaky, "gelu": F.gelu}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("experts", "rho", "mean"), [(2, 0.9, 0.0), (8, 0.5, 0.0), (3, 0.7, -0.8)])
def test_mean_gap(name: str, experts: int, rho: float, mean: float) -> None:
    found, error, _, _ = measured(gaussians(experts, rho, mean=mean), ACTIVATIONS[name])
    v = merged_variance(1.69, rho, experts=experts)
    assert error < 0.02 * found  # precise enough to tell
    assert abs(found - expected(name, 1.69, v, mean)) < 3 * error


def test_mean_gap_with_unequal_coefficients() -> None:
    shares = [0.7, 0.2, 0.1]
    found, error, _, _ = measured(gaussians(3, 0.6, mean=0.4), F.gelu, shares)
    v = merged_variance(1.69, 0.6, coefficients=torch.tensor(shares))
    assert abs(found - float(expected_gelu_gap(1.69, v, mean=0.4))) < 3 * error
    uniform = merged_variance(1.69, 0.6, experts=3)
    assert abs(found - float(expected_gelu_gap(1.69, uniform, mean=0.4))) > 10 * error


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 0.99])
def test_squared_relu_gap_of_two(rho: float) -> None:
    _, _, found, error = measured(gaussians(2, rho), F.relu)
    assert abs(found - float(expected_squared_relu_gap_of_two(1.69, rho))) < 3 * error


@pytest.mark.parametrize("experts", [2, 8])
def test_squared_gelu_gap_of_a_small_spread(experts: int) -> None:
    _, _, found, error = measured(gaussians(experts, 0.999), F.gelu)
    wanted = float(expected_squared_gelu_gap(1.69, 0.999, experts=experts))
    assert abs(found - wanted) < 3 * error + 0.01 * wanted  # leading order in 1 - rho


def test_the_numbers_of_the_specification() -> None:
    """papers.md 1.3.2, s = 1.3, as printed there."""
    two, eight = (merged_variance(1.69, r, experts=n) for r, n in ((0.9, 2), (0.5, 8)))
    assert float(expected_relu_gap(1.69, two)) == pytest.approx(0.01313, abs=6e-6)
    assert float(expected_gelu_gap(1.69, two)) == pytest.approx(0.01427, abs=6e-6)
    assert float(expected_relu_gap(1.69, eight)) == pytest.approx(0.12966, abs=6e-6)
    assert float(expected_gelu_gap(1.69, eight)) == pytest.approx(0.13954, abs=6e-6)
    assert float(expected_leaky_relu_gap(1.69, eight, slope=0.1)) == pytest.approx(
        0.11669, abs=6e-6
    )
    assert float(expected_squared_relu_gap_of_two(1.69, 0.9)) == pytest.approx(0.002036, abs=6e-7)
    assert float(expected_squared_gelu_gap(1.69, 0.99, experts=2)) == pytest.approx(
        1.19e-5, abs=6e-8
    )
    assert float(expected_squared_gelu_gap(1.69, 0.99, experts=8)) == pytest.approx(
        1.55e-5, abs=1e-7
    )


def test_equal_experts_have_no_gap() -> None:
    v = merged_variance(2.0, 1.0, experts=4)
    for name in ACTIVATIONS:
        assert expected(name, 2.0, v, 0.3) == pytest.approx(0, abs=1e-16)
    assert float(expected_squared_relu_gap_of_two(2.0, 1.0)) == 0
    assert float(expected_squared_gelu_gap(2.0, 1.0, experts=3)) == 0


def test_the_series_near_one_meets_the_exact_form_and_its_limit() -> None:
    rho = torch.cos(torch.tensor([0.0499999, 0.0500001], dtype=torch.float64))
    left, right = expected_squared_relu_gap_of_two(1.0, rho)
    slope = 3 - 0.05**2 / 10  # of the logarithm, by the logarithm of the angle
    ratio = (0.0499999 / 0.0500001) ** slope
    assert float(left / right) == pytest.approx(ratio, rel=1e-11)
    tiny = 1e-10
    limit = (2 * tiny) ** 1.5 / (24 * math.pi)
    assert float(expected_squared_relu_gap_of_two(1.0, 1 - tiny)) == pytest.approx(limit, rel=1e-5)


def test_no_spread_is_the_activation_itself() -> None:
    v = torch.zeros((), dtype=torch.float64)
    assert float(expected_relu_gap(1.0, v, mean=-40.0)) == 0
    assert float(expected_relu_gap(0.0, v, mean=-2.0)) == 0


def test_experts_or_coefficients_but_not_both() -> None:
    with pytest.raises(ValueError, match="not both"):
        merged_variance(1.0, 0.5)
