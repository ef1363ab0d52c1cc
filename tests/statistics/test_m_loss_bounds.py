"""Bounds hold on random layers, and the spread from weights is the spread of the data."""

import pytest
import torch
import torch.nn.functional as F

from mergewell.statistics.gaussian import Law
from mergewell.statistics.m_loss import ActivationBatch, MLoss
from mergewell.statistics.m_loss_bounds import dispersion, gap_bound, largest_bend, row_spread
from mergewell.statistics.m_loss_theory import Moments

SHARES = [0.5, 0.2, 0.3]
LAWS = {
    "relu": Law("relu", F.relu),
    "relu6": Law("relu6", F.relu6),
    "leaky_relu": Law("leaky_relu", lambda z: F.leaky_relu(z, 0.3), 0.3),
    "gelu": Law("gelu", F.gelu),
    "silu": Law("silu", F.silu),
    "tanh": Law("tanh", torch.tanh),
}


def layers(size: float = 0.3):
    torch.manual_seed(0)
    base = torch.randn(7, 5, dtype=torch.float64)
    return [base + size * torch.randn(7, 5, dtype=torch.float64) for _ in SHARES]


def test_the_largest_bends_of_the_specification() -> None:
    assert largest_bend(F.gelu) == pytest.approx(0.798, abs=5e-4)
    assert largest_bend(lambda z: z * torch.sigmoid(1.702 * z)) == pytest.approx(0.851, abs=5e-4)
    assert largest_bend(F.silu) == pytest.approx(0.5, abs=1e-4)


def test_the_spread_from_weights_and_inputs_is_the_measured_one() -> None:
    matrices = layers()
    h = torch.randn(200, 5, dtype=torch.float64)
    z = [h @ matrix.T for matrix in matrices]
    moments = Moments.of(MLoss().update({}, ActivationBatch(z, SHARES, F.gelu, -1)))
    assert moments is not None
    torch.testing.assert_close(row_spread(matrices, SHARES, h.T @ h / 200), moments.spread)
    white = torch.linalg.qr(h).Q * 200**0.5  # its second moment is the identity
    z = [white @ matrix.T for matrix in matrices]
    moments = Moments.of(MLoss().update({}, ActivationBatch(z, SHARES, F.gelu, -1)))
    assert moments is not None
    torch.testing.assert_close(row_spread(matrices, SHARES), moments.spread)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("size", [0.01, 0.3, 3.0])
def test_the_bound_holds(name: str, size: float) -> None:
    law, matrices = LAWS[name], layers(size)
    h = torch.randn(500, 5, dtype=torch.float64) * 3
    z = torch.stack([h @ matrix.T for matrix in matrices])
    c = torch.tensor(SHARES, dtype=torch.float64)
    ensemble = torch.einsum("k,kno->no", c, law.function(z))
    gap = ensemble - law.function(torch.einsum("k,kno->no", c, z))
    bound = gap_bound(law, row_spread(matrices, SHARES, h.T @ h / 500))
    assert (gap.abs().mean(0) <= bound).all() and bool((gap != 0).any())


def test_the_relu_bound_is_met_by_two_opposed_experts() -> None:
    z = [torch.tensor([[2.0]]), torch.tensor([[-2.0]])]
    state = MLoss().update({}, ActivationBatch(z, [0.5, 0.5], F.relu, -1))
    assert float(gap_bound(LAWS["relu"], torch.tensor([4.0]))) == float(state["gap"]) == 1.0


def test_dispersion_by_hand() -> None:
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
    assert dispersion(tensors, [0.5, 0.5]) == 1.0
    assert dispersion(tensors, [0.75, 0.25]) == 0.75
    assert dispersion([tensors[0]] * 3, [0.2, 0.3, 0.5]) == 0
    matrices = layers()
    mean = sum(c * m for c, m in zip(SHARES, matrices, strict=True))
    wanted = sum(c * (m - mean).square().sum() for c, m in zip(SHARES, matrices, strict=True))
    assert dispersion(matrices, SHARES) == pytest.approx(float(wanted))
