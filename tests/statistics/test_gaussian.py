"""Expectations under Gaussians against sampling, limits and a second way to compute them."""

import math

import pytest
import torch
import torch.nn.functional as F

from mergewell.statistics.gaussian import Law

LAWS = {
    "relu": Law("relu", F.relu),
    "relu6": Law("relu6", F.relu6),
    "leaky_relu": Law("leaky_relu", lambda z: F.leaky_relu(z, 0.1), 0.1),
    "gelu": Law("gelu", F.gelu),
    "silu": Law("silu", F.silu),
    "tanh": Law("tanh", torch.tanh),
    "identity": Law("identity", lambda z: z),
}
GRID = [(0.0, 1.0), (-0.7, 0.2), (1.5, 4.0), (6.2, 0.5), (0.3, 60.0)]


def fine(function, mean: float, variance: float) -> float:
    """A midpoint sum of 400 000 points."""
    t = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 20_000 - 10
    weight = torch.exp(-t * t / 2) / math.sqrt(2 * math.pi) / 20_000
    return float((function(mean + math.sqrt(variance) * t) * weight).sum())


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("mean", "variance"), GRID)
def test_means_agree_with_a_fine_sum(name: str, mean: float, variance: float) -> None:
    wanted = fine(LAWS[name].function, mean, variance)
    assert float(LAWS[name].mean(mean, variance)) == pytest.approx(wanted, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("mean", "variance"), GRID)
def test_mean_slopes_are_the_derivatives_of_means(name: str, mean: float, variance: float) -> None:
    law, step = LAWS[name], 1e-5
    rise = float(law.mean(mean + step, variance) - law.mean(mean - step, variance))
    assert float(law.slope_mean(mean, variance)) == pytest.approx(rise / (2 * step), abs=1e-6)


def test_the_specification_for_mean_zero() -> None:
    s2 = 1.69
    gelu = s2 / math.sqrt(1 + s2) / math.sqrt(2 * math.pi)
    assert float(LAWS["gelu"].mean(0.0, s2)) == pytest.approx(gelu, rel=1e-14)
    assert float(LAWS["relu"].mean(0.0, s2)) == pytest.approx(1.3 / math.sqrt(2 * math.pi))


@pytest.mark.parametrize("name", LAWS)
def test_without_variance_the_mean_is_the_function(name: str) -> None:
    points = torch.tensor([-3.0, -0.1, 0.4, 7.0], dtype=torch.float64)
    found = LAWS[name].mean(points, 0.0)
    torch.testing.assert_close(found, LAWS[name].function(points), rtol=1e-12, atol=1e-15)


def test_an_unknown_activation_is_refused() -> None:
    law = Law("custom", torch.sin)
    assert not law.is_known
    with pytest.raises(ValueError, match="'custom'"):
        law.mean(0.0, 1.0)
