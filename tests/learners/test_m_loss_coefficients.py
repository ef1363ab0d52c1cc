"""Coefficients a layer: what is found, how one-hot collapse is prevented, and the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.learners.base import Material
from mergewell.learners.m_loss_coefficients import MLossCoefficients
from mergewell.learners.ops import entropy, kept_apart, layer_fits
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2)).eval()


def recipe_of(folder: Path, count: int = 3) -> Recipe:
    torch.manual_seed(0)
    base = net().state_dict()
    save_file(base, folder / "base.safetensors")
    for place in range(count):
        state = {name: t + torch.randn_like(t) for name, t in base.items()}
        save_file(state, folder / f"{place}.safetensors")
    paths = [{"path": str(folder / f"{place}.safetensors")} for place in range(count)]
    return make_recipe({"base": str(folder / "base.safetensors"), "experts": paths})


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(20, 3) for _ in range(count)]


def test_entropy_and_the_floor() -> None:
    assert entropy(torch.tensor([1.0, 0.0])) == 0.0
    assert entropy(torch.full((4,), 0.25)) == pytest.approx(1.0)
    shares = torch.tensor([0.998, 0.001, 0.001], dtype=torch.float64)
    mixed = kept_apart(shares, 0.5)
    assert entropy(mixed) == pytest.approx(0.5) and float(mixed.sum()) == pytest.approx(1.0)
    assert torch.equal(kept_apart(mixed, 0.4), mixed)
    assert entropy(kept_apart(shares, 1.0)) == pytest.approx(1.0)


def test_a_routed_reference_of_one_expert_finds_it_and_the_floor_holds(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    material = Material(net, tasks=[LearningTask(1, batches())])
    free = MLossCoefficients(reference="routed", least_entropy=0.0, steps=300).learn(
        recipe, material
    )
    assert {rule.match for rule in free.recipe.rules} == {"0.weight", "0.bias"}
    found = free.recipe.rules[0].coefficients
    assert found is not None and found[1] > 0.95
    assert free.score > -0.1 > free.trials[0].score
    floored = MLossCoefficients(reference="routed", least_entropy=0.6, steps=300).learn(
        recipe, material
    )
    shares = floored.recipe.rules[0].coefficients
    assert shares is not None and entropy(torch.tensor(shares)) == pytest.approx(0.6, abs=1e-3)
    assert "entropy of the coefficients 0.60 of log K" in floored.recipe.notes[0]


def test_the_gap_falls_and_the_recipe_carries_the_coefficients_out(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    learned = MLossCoefficients().learn(
        recipe, Material(net, tasks=[LearningTask(None, batches())])
    )
    assert learned.score > learned.trials[0].score
    plan = make_plan(learned.recipe)
    assert plan.tasks["0.weight"].coefficients == learned.recipe.rules[0].coefficients
    assert plan.tasks["2.weight"].coefficients == (1.0, 1.0, 1.0)
    # the merged layer gives f(sum c z): the discrepancy by hand is the score
    experts = [net() for _ in plan.experts]
    for module, checkpoint in zip(experts, plan.experts, strict=True):
        module.load_state_dict({name: checkpoint[name] for name in checkpoint})
    merged = dict(merge_tensors(plan))
    gap = energy = 0.0
    for x in batches():
        target = torch.stack([module[:2](x) for module in experts]).mean(0).detach()  # pyright: ignore
        gap += float(
            (nn.functional.gelu(x @ merged["0.weight"].T + merged["0.bias"]) - target)
            .square()
            .sum()
        )
        energy += float(target.square().sum())
    assert learned.score == pytest.approx(-((gap / energy) ** 0.5), rel=1e-4)


def test_padding_is_left_out() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(3, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.relu(self.up(x)).mean(1)

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    (fit,) = layer_fits(Tokens(), [Tokens()], [{"x": torch.randn(2, 3, 3), "attention_mask": mask}])
    assert fit.targets[0].shape == (3, 4)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(DataError, match="learns from unlabelled inputs"):
        MLossCoefficients().learn(recipe, Material(net))
    with pytest.raises(DataError, match="needs to know each batch's own expert"):
        MLossCoefficients(reference="routed").learn(
            recipe,
            Material(
                net, tasks=[LearningTask(k, [x]) for k, x in zip((0, 3, 1), batches(), strict=True)]
            ),
        )
