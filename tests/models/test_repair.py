"""REPAIR: the merged layers get the endpoints' interpolated moments."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, RecipeError
from mergewell.explain.split import soup
from mergewell.models.repair import repair


def net(*, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 12), nn.GELU(), nn.Linear(12, 3)
    )


def inputs(count: int = 200) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(5))


def pre_activations(module: nn.Module, x: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Mean and std of each channel of the two hidden layers."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for place, layer in enumerate(module):
            x = layer(x)
            if place in (0, 3):
                rows = x.transpose(0, 1).flatten(1)
                seen[place] = (rows.mean(1), rows.std(1, correction=0))
    return seen


def test_hidden_layers_get_the_interpolated_mean_and_std() -> None:
    ends = [net(seed=1), net(seed=2)]
    merged = soup(ends, [0.25, 0.75])
    x = inputs()
    untouched = repair(merged, ends, [0.25, 0.75], [x]).untouched
    left, right, found = (pre_activations(module, x) for module in (*ends, merged))
    for place in (0, 3):
        for moment in (0, 1):
            goal = 0.25 * left[place][moment] + 0.75 * right[place][moment]
            assert torch.allclose(found[place][moment], goal, atol=1e-4)
    assert untouched == {"5": "gives the module's output"}


def test_the_output_layer_and_the_endpoints_stay() -> None:
    ends = [net(seed=1), net(seed=2)]
    before = copy.deepcopy(ends)
    merged = soup(ends)
    head = merged[5].weight.clone()
    repair(merged, ends, [0.5, 0.5], inputs().split(100))
    assert torch.equal(merged[5].weight, head)
    for one, other in zip(ends, before, strict=True):
        for left, right in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(left, right)


def test_an_endpoint_itself_is_not_changed() -> None:
    end = net(seed=1)
    same = copy.deepcopy(end)
    repair(same, [end], [1.0], [inputs()])
    for left, right in zip(end.parameters(), same.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-5)


def test_batch_norms_are_re_estimated_and_biasless_layers_named() -> None:
    def mixed(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.ReLU(),
            nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2),
        )  # fmt: skip

    ends = [mixed(1), mixed(2)]
    merged = soup(ends)
    done = repair(merged, ends, [0.5, 0.5], [torch.randn(50, 4)])
    assert done.layers == ("1", "5")
    assert done.untouched == {
        "0": "a BatchNorm follows it",
        "3": "has no bias to fold the shift into",
        "7": "gives the module's output",
    }
    assert merged[1].running_mean.abs().sum() > 0


def test_a_constant_channel_is_shifted_and_not_scaled() -> None:
    ends = [net(seed=1), net(seed=2)]
    merged = soup(ends)
    with torch.no_grad():
        for module in (*ends, merged):
            module[0].weight[0] = 0.0
        merged[0].bias[0] = 7.0
    repair(merged, ends, [0.5, 0.5], [inputs()])
    assert merged[0].bias[0].item() == pytest.approx(
        (ends[0][0].bias[0].item() + ends[1][0].bias[0].item()) / 2, abs=1e-5
    )
    assert merged[0].weight.isfinite().all()


def test_mistakes_are_refused() -> None:
    with pytest.raises(ModelError, match="no layer that can be repaired"):
        repair(nn.Linear(2, 2), [nn.Linear(2, 2)], [1.0], [torch.zeros(2, 2)])
    with pytest.raises(RecipeError, match="sum to 1"):
        repair(net(seed=0), [net(seed=1)], [2.0], [inputs()])
    with pytest.raises(ModelError, match="An endpoint has no layer '3'"):
        repair(net(seed=0), [net(seed=1)[:2]], [1.0], [inputs()])
