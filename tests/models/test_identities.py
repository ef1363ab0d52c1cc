"""What M-Loss must obey in small networks: papers.md 1.10.4, 3.3.3 and 3.4.1."""

import math

import pytest
import torch
import torch.nn.functional as F
from nets import average, moved
from torch import nn

from mergewell.models.capture import measure_m_loss
from mergewell.models.trace import trace


def two_layers(activation: type[nn.Module] = nn.GELU, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 20, bias=bias), activation(), nn.Linear(20, 3, bias=bias))
    return net.double()


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.6, 0.3, 0.1]])
def test_the_ensemble_less_the_merge_is_a_gap_and_a_covariance(shares: list[float]) -> None:
    """mean W2 h - W2mean s(W1mean x) = Cov(W2, h) + W2mean (node gap), to rounding."""
    net, x = two_layers(), torch.randn(30, 6, dtype=torch.float64)
    experts = [moved(net, seed, 0.5) for seed in range(len(shares))]
    merged = average(experts, shares)
    found = trace(net, x)
    layer, output = measure_m_loss(
        experts,
        found,
        batches=[x],
        kinds=["activation", "output"],
        merged=merged,
        coefficients=shares,
    )
    with torch.no_grad():
        h = [expert[:2](x) for expert in experts]
        mean_h = sum(c * part for c, part in zip(shares, h, strict=True))
        gap = mean_h - merged[:2](x)  # the hidden layer of both sides has the same input
        covariance = sum(
            c * (part - mean_h) @ (expert[2].weight - merged[2].weight).T
            for c, part, expert in zip(shares, h, experts, strict=True)
        )
        both = covariance + gap @ merged[2].weight.T
    torch.testing.assert_close(layer.node, gap.square().mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(output.node, both.square().mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(output.mean_gap, both.mean(0), rtol=1e-9, atol=1e-15)


def test_one_linear_layer_merges_exactly() -> None:
    net, x = nn.Sequential(nn.Linear(6, 4)).double(), torch.randn(30, 6, dtype=torch.float64)
    experts = [moved(net, seed, 0.5) for seed in range(3)]
    (layer,) = measure_m_loss(
        experts, trace(net, x), batches=[x], kinds=["output"], merged=average(experts)
    )
    assert layer.relative < 1e-15


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_a_relu_network_without_biases_is_invariant_to_scale(scale: float) -> None:
    """Weights times s: layer l's relative M-Loss stays, its absolute one grows by s^l."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 9, bias=False),
        nn.ReLU(),
        nn.Linear(9, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
    )
    x = torch.randn(40, 6)
    experts = [moved(net, seed, 0.5) for seed in range(3)]
    scaled = [moved(expert, 0, 0.0) for expert in experts]
    with torch.no_grad():
        for expert in scaled:
            for parameter in expert.parameters():
                parameter *= scale
    found = trace(net, x)
    kinds = ["activation", "output"]
    pairs = [
        measure_m_loss(group, found, batches=[x], kinds=kinds, merged=average(group))
        for group in (experts, scaled)
    ]
    assert len(pairs[0]) == 3 and pairs[0][0].relative > 0.05
    for depth, (one, other) in enumerate(zip(*pairs, strict=True), start=1):
        assert other.relative == pytest.approx(one.relative, rel=1e-6)
        assert other.absolute == pytest.approx(one.absolute * scale**depth, rel=1e-6)
        torch.testing.assert_close(other.node, one.node * scale ** (2 * depth), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("activation", "of_mean", "of_square"), [(nn.GELU, 2, 4), (nn.SiLU, 2, 4), (nn.ReLU, 2, 3)]
)
def test_slopes_in_the_size_of_the_task_vectors(activation, of_mean: int, of_square: int) -> None:
    """Mean gap ~ t^2; mean square ~ t^4 where smooth, t^3 for ReLU: papers.md 1.10.4 item 8."""
    net = two_layers(activation)
    x = torch.randn(100_000, 6, dtype=torch.float64)
    sizes = []
    for t in (0.02, 0.04):
        experts = [moved(net, seed, t) for seed in range(3)]
        (layer,) = measure_m_loss(
            experts, trace(net, x[:2]), batches=[x], mode="pretrained", base=net
        )
        sizes.append((float(layer.mean_gap.sum()), float(layer.node.sum())))
    slopes = [math.log2(sizes[1][i] / sizes[0][i]) for i in range(2)]
    assert slopes == [pytest.approx(of_mean, abs=0.12), pytest.approx(of_square, abs=0.12)]


def test_leaky_relu_is_a_share_of_relu() -> None:
    class Leaky(nn.LeakyReLU):
        def __init__(self) -> None:
            super().__init__(0.25)

    x = torch.randn(50, 6, dtype=torch.float64)
    nodes = []
    for activation in (nn.ReLU, Leaky):
        net = two_layers(activation)
        experts = [moved(net, seed, 0.5) for seed in range(2)]
        (layer,) = measure_m_loss(experts, trace(net, x), batches=[x], mode="pretrained", base=net)
        nodes.append(layer.mean_gap)
    torch.testing.assert_close(nodes[1], 0.75 * nodes[0], rtol=1e-9, atol=1e-15)
    assert F.relu(nodes[0]).equal(nodes[0])  # the gap of ReLU is never negative
