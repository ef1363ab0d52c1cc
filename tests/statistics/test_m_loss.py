"""The M-Loss statistic against hand-worked numbers, its laws and the Gaussian closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mergewell.errors import DataError, RecipeError
from mergewell.statistics import m_loss as file
from mergewell.statistics.m_loss import ActivationBatch, MLoss

HALF = [0.5, 0.5]


def value(z, activation=F.relu, *, coefficients=None, node_dim=-1, merged=None, keep=None):
    shares = coefficients or [1 / len(z)] * len(z)
    batch = ActivationBatch(z, shares, activation, node_dim, merged, keep)
    return MLoss().value(MLoss().update({}, batch))


def test_two_relu_experts_by_hand() -> None:
    # gap = min(|z1|, |z2|) / 2 where signs disagree, else 0
    z = torch.tensor([[[2.0, 1.0], [4.0, -6.0]], [[-3.0, 5.0], [2.0, 8.0]]])
    found = value(z)
    gap = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    ensemble = torch.tensor([[1.0, 3.0], [3.0, 4.0]], dtype=torch.float64)
    assert found["mean_gap"].tolist() == [0.5, 1.5]
    assert found["node"].tolist() == [0.5, 4.5]
    assert found["energy"].tolist() == [5.0, 12.5]
    assert float(found["absolute"]) == (1 + 3) / 2
    assert float(found["relative"]) == pytest.approx(
        math.sqrt(float(gap.square().sum() / ensemble.square().sum())), rel=1e-15
    )


def test_coefficients_weigh_the_experts() -> None:
    z = torch.tensor([[[2.0]], [[-4.0]]])
    assert float(value(z, coefficients=[0.75, 0.25])["mean_gap"]) == 0.75 * 2 - 0.5
    assert float(value(z, coefficients=[1.0, 0.0])["node"]) == 0


def test_positions_are_observations_and_convolutions_count_nodes_second() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 4, 5, 2, 2)  # K, N, O, H, W
    found = value(z, F.silu, node_dim=1)
    double = z.double()
    gap = F.silu(double).mean(0) - F.silu(double.mean(0))
    torch.testing.assert_close(found["node"], gap.square().mean((0, 2, 3)))
    torch.testing.assert_close(found["absolute"], gap.flatten(1).norm(dim=1).mean())


@pytest.mark.parametrize("experts", [2, 3, 4, 7])
@pytest.mark.parametrize("activation", [F.relu, F.gelu, F.silu, torch.sin])
def test_equal_experts_give_exactly_zero(experts: int, activation) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 3, 11)
    found = value([z] * experts, activation)
    assert found["node"].eq(0).all() and found["absolute"] == 0 and found["relative"] == 0


def test_a_linear_activation_gives_exactly_zero_and_an_affine_one_rounding() -> None:
    torch.manual_seed(0)
    z = torch.randn(3, 6, 11)
    shares = [0.2, 0.3, 0.5]
    assert value(z, lambda x: x, coefficients=shares)["node"].eq(0).all()
    assert value(z, lambda x: -2 * x, coefficients=shares)["node"].eq(0).all()
    assert value(z, lambda x: 3.3 * x + 0.7, coefficients=shares)["node"].max() < 1e-30


def test_relu_of_pre_activations_of_one_sign_gives_zero() -> None:
    assert value(torch.randint(1, 9, (2, 5, 4)).float())["node"].eq(0).all()


def test_the_merged_activation_can_be_given() -> None:
    z = torch.tensor([[[2.0, -1.0]], [[4.0, -1.0]]])
    found = value(z, merged=torch.tensor([[1.0, 5.0]]))
    assert found["mean_gap"].tolist() == [2.0, -5.0]


def test_padding_does_not_count() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 5)
    keep = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    dirty = z.masked_fill(~keep.bool()[None, ..., None], float("nan"))
    found = value(dirty, F.gelu, keep=keep)
    gap = F.gelu(z.double()).mean(0) - F.gelu(z.double().mean(0))
    torch.testing.assert_close(found["node"], gap[keep.bool()].square().mean(0))
    ensemble = F.gelu(z.double()).mean(0)[keep.bool()]
    torch.testing.assert_close(found["energy"], ensemble.square().mean(0))
    norms = (gap * keep[..., None]).flatten(1).norm(dim=1)
    torch.testing.assert_close(found["absolute"], norms.sum() / 2)  # the third has no tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 99))
def test_join_of_parts_is_the_whole(cut: int, seed: int) -> None:
    z = torch.randn(3, 10, 2, 7, generator=torch.Generator().manual_seed(seed))
    statistic = MLoss()

    def part(rows: slice):
        return statistic.update({}, ActivationBatch(z[:, rows], [0.2, 0.3, 0.5], F.gelu, -1))

    whole = statistic.value(part(slice(None)))
    left, right = part(slice(None, cut)), part(slice(cut, None))
    both = statistic.value(statistic.join(left, right))
    onwards = statistic.update(left, ActivationBatch(z[:, cut:], [0.2, 0.3, 0.5], F.gelu, -1))
    for key, wanted in whole.items():
        torch.testing.assert_close(both[key], wanted, rtol=1e-13, atol=0)
        torch.testing.assert_close(statistic.value(onwards)[key], wanted, rtol=1e-13, atol=0)
    assert statistic.join(statistic.start(), left) == left


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 6, 4, 3)
    whole = value(z, F.gelu, node_dim=1)
    for size in (1, 24, 30, 100):
        monkeypatch.setattr(file, "BLOCK", size)
        for key, found in value(z, F.gelu, node_dim=1).items():
            torch.testing.assert_close(found, whole[key], rtol=1e-13, atol=0)


def test_an_ensemble_of_zeros_stays_finite() -> None:
    assert float(value(torch.zeros(2, 3, 4))["relative"]) == 0
    assert float(value(torch.zeros(2, 3, 4), merged=torch.ones(3, 4))["relative"]) == 1


def test_mistakes_are_named() -> None:
    z = torch.zeros(2, 3, 4)
    for wrong in ([0.5, 0.6], [1.5, -0.5], [float("nan"), 0.5], [1.0], [1.0, 0.0, 0.0]):
        with pytest.raises(RecipeError, match="M-Loss"):
            value(z, coefficients=wrong)
    with pytest.raises(DataError, match="shapes"):
        value([torch.zeros(3, 4), torch.zeros(3, 5)])
    with pytest.raises(DataError, match="mask"):
        value(z, keep=torch.ones(3, 4))
    with pytest.raises(DataError, match="count samples"):
        value(z, node_dim=0)
    with pytest.raises(DataError, match="no observations"):
        MLoss().value({})
    with pytest.raises(DataError, match="no observations"):
        value(torch.zeros(2, 3, 4), keep=torch.zeros(3))
