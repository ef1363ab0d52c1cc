"""L2-SP, weight scopes and SAM against examples worked by hand."""

from __future__ import annotations

from math import log

import pytest
import torch
from torch import Tensor, nn

from mergewell.errors import ModelError, RecipeError
from mergewell.finetune import L2SP, Sam, Scope, WeightScope, fused, scopes_of


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def linear(*values: float) -> nn.Linear:
    module = nn.Linear(len(values), 1)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([values]))
    return module


def number(value: Tensor) -> float:
    return float(value.detach())


def grad(each: nn.Parameter) -> list[float]:
    assert each.grad is not None
    return each.grad.flatten().tolist()


def test_l2_sp_by_hand() -> None:
    theta = parameter(1.0, 2.0)
    penalty = L2SP([theta], strength=0.5)
    assert number(penalty.value()) == 0
    with torch.no_grad():
        theta += torch.tensor([3.0, -4.0])
    assert number(penalty.value()) == 0.25 * 25
    assert penalty.distance() == 5
    theta.grad = torch.tensor([1.0, 1.0])
    penalty.add_gradient()  # 1 + 0.5 * (3, -4)
    assert grad(theta) == [2.5, -1.0]
    fresh = parameter(1.0)
    both = L2SP([fresh], strength=2.0)
    both.add_gradient()
    assert grad(fresh) == [0.0]


def test_gradients_added_are_those_of_the_penalty_in_the_loss() -> None:
    torch.manual_seed(0)
    for kind in ("l2_sp", "weight_scope"):
        module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        frozen = module[0].bias.requires_grad_(False)
        penalty = (
            L2SP(module.parameters(), strength=0.3)
            if kind == "l2_sp"
            else WeightScope(module, strength=0.3)
        )
        with torch.no_grad():
            for each in module.parameters():
                each.add_(torch.randn_like(each))
        x = torch.randn(5, 3)

        def loss(module: nn.Module = module, x: Tensor = x) -> Tensor:
            return module(x).square().mean()

        (loss() + penalty.value()).backward()
        wanted = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        loss().backward()
        penalty.add_gradient()
        assert frozen.grad is None
        for each, one in zip(module.parameters(), wanted, strict=True):
            assert (each.grad is None) == (one is None)
            if one is not None:
                torch.testing.assert_close(each.grad, one)


def test_weight_scope_by_hand() -> None:
    module = linear(-1.0, 1.0)
    penalty = WeightScope(module, strength=2.0)
    assert penalty.names == ("weight",)
    assert scopes_of(module) == {"weight": Scope(0.0, 1.0)}
    assert number(penalty.value()) == pytest.approx(0)
    with torch.no_grad():  # mean 1, deviation 2 beside N(0, 1)
        module.weight.copy_(torch.tensor([[-1.0, 3.0]]))
    assert number(penalty.value()) == pytest.approx(2 * (-log(2) + (4 + 1) / 2 - 0.5))
    wide = WeightScope(module, strength=1.0, targets={"weight": Scope(1.0, 2.0)})
    assert number(wide.value()) == pytest.approx(0, abs=1e-6)


def test_fused_scopes() -> None:
    first, second = {"w": Scope(0.0, 3.0)}, {"w": Scope(1.0, 4.0)}
    assert fused([first, second])["w"] == Scope(0.5, pytest.approx(12.5**0.5))
    with pytest.raises(RecipeError, match="v has a scope in one model only"):
        fused([first, {"w": Scope(0, 1), "v": Scope(0, 1)}])
    with pytest.raises(RecipeError, match="no scopes to fuse"):
        fused([])


def test_sam_is_its_two_steps() -> None:
    # L = theta_1^2 + 3 theta_2 at (3, 5): g = (6, 3); the gradient 0.5 away is 2 (3 + 0.5 cos), 3
    theta = parameter(3.0, 5.0)

    def loss() -> Tensor:
        return theta[0] ** 2 + 3 * theta[1]

    told = Sam([theta], radius=0.5).backward(loss)
    assert float(told) == 24 and not told.requires_grad
    assert grad(theta) == pytest.approx([2 * (3 + 0.5 * 6 / 45**0.5), 3.0])
    assert theta.tolist() == [3.0, 5.0]
    Sam([theta], radius=0.0).backward(loss)
    assert grad(theta) == [6.0, 3.0]
    # adaptive: |theta| g = (18, 15), theta^2 g = (54, 75)
    Sam([theta], radius=0.5, adaptive=True).backward(loss)
    assert grad(theta)[0] == pytest.approx(2 * (3 + 0.5 * 54 / (18**2 + 15**2) ** 0.5))


def test_sam_where_the_gradient_vanishes_or_the_loss_fails() -> None:
    theta, unused = parameter(0.0), parameter(1.0)
    Sam([theta, unused], radius=0.5).backward(lambda: theta.square().sum())
    assert grad(theta) == [0.0] and unused.grad is None
    other = parameter(1.0)
    calls: list[float] = []

    def loss() -> Tensor:
        calls.append(number(other))
        return other.sum() / 0 if len(calls) == 2 else other.sum()

    with pytest.raises(ModelError, match="loss is not finite"):
        Sam([other], radius=0.5).backward(loss)
    assert calls == [1.0, 1.5] and number(other) == 1.0


def test_mistakes_are_sentences() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(ModelError, match="unfreeze"):
        L2SP([frozen], strength=1)
    with pytest.raises(ModelError, match="unfreeze"):
        scopes_of(nn.LayerNorm(2))
    with pytest.raises(RecipeError, match="strength of L2-SP is -1"):
        L2SP([parameter(1.0)], strength=-1)
    with pytest.raises(RecipeError, match="radius of SAM is nan"):
        Sam([parameter(1.0)], radius=float("nan"))
    with pytest.raises(RecipeError, match="targets lack weight"):
        WeightScope(linear(1.0, 2.0), strength=1, targets={})
    with pytest.raises(RecipeError, match="weight has no spread"):
        WeightScope(linear(1.0, 1.0), strength=1)
