"""The greedy soup: what is kept, and the recipe that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mergewell.errors import DataError, RecipeError
from mergewell.learners.base import LEARNERS, Material
from mergewell.learners.greedy_soup import GreedySoup, soup_of
from mergewell.learners.ops import best_first, greedy_selection
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors


def one_weight() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def recipe_of(folder: Path, weights: list[float], **more: object) -> Recipe:
    for place, weight in enumerate(weights):
        tensors = {"weight": torch.tensor([[weight]])}
        save_file(tensors, folder / f"{place}.safetensors")
    experts = [{"path": str(folder / f"{place}.safetensors")} for place in range(len(weights))]
    return make_recipe({"experts": experts, **more})


def near_zero(module: nn.Module) -> float:
    """Best at weight 0."""
    return -abs(float(module.weight.detach()))  # pyright: ignore


def names(recipe: Recipe) -> list[str]:
    return [Path(expert.path).stem for expert in recipe.experts]


def test_best_first_and_kept_if_the_metric_does_not_fall(tmp_path: Path) -> None:
    """Alone -2, -1, -9, -3; with 1 (at -1): 0 gives 0.5, then 3 would give -2/3, 2 -10/3."""
    recipe = recipe_of(tmp_path, [2.0, -1.0, 9.0, -3.0])
    steps: list[tuple[str, int, int]] = []
    learned = GreedySoup().learn(
        recipe, Material(one_weight, near_zero), on_step=lambda *step: steps.append(step)
    )
    assert names(learned.recipe) == ["1", "0"]
    assert learned.score == -0.5
    assert [t.score for t in learned.trials[:4]] == [-2.0, -1.0, -9.0, -3.0]
    assert [t.score for t in learned.trials[4:]] == pytest.approx([-0.5, -2 / 3, -10 / 3])
    assert [names(t.recipe) for t in learned.trials if t.kept] == [["1"], ["1", "0"]]
    assert steps == [("soups", done, 7) for done in range(1, 8)]
    assert "kept 2 of 4 experts" in learned.recipe.notes[0]


def test_the_recipe_carries_out_what_was_judged(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, [2.0, -1.0, 9.0])
    learned = GreedySoup().learn(recipe, Material(one_weight, near_zero))
    again = make_recipe(learned.recipe.as_data())
    ((_, merged),) = merge_tensors(make_plan(again))
    assert -abs(merged.item()) == learned.score


def test_an_expert_that_changes_nothing_is_kept() -> None:
    assert greedy_selection((2, 0, 1), lambda members: 1.0, first=1.0) == ((2, 0, 1), 1.0)
    assert greedy_selection((0, 1), lambda members: 0.9, first=1.0) == ((0,), 1.0)


def test_ties_stay_in_their_order() -> None:
    assert best_first([0.5, 0.9, 0.5, 0.9]) == (1, 3, 0, 2)


def test_rules_go_with_their_experts(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, [1.0, 2.0, 3.0], rules=[{"match": "weight", "coefficients": [1.0, 2.0, 3.0]}],
        method={"name": "task_arithmetic"},
    )  # fmt: skip
    chosen = soup_of(recipe, (2, 0))
    assert names(chosen) == ["2", "0"]
    assert chosen.rules[0].coefficients == (3.0, 1.0)
    assert chosen.method.name == "average"


def test_a_metric_is_needed_and_so_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="greedy_soup chooses by a metric on held-out labelled"):
        GreedySoup().learn(recipe_of(tmp_path, [1.0]), Material(one_weight))


def test_the_family_finds_it_by_its_file() -> None:
    assert "greedy_soup" in LEARNERS.names()
    assert LEARNERS.get("greedy_soup") is GreedySoup
    assert LEARNERS.get("greedy_soup").summary().startswith("Average the experts that help")
    with pytest.raises(RecipeError, match="did you mean 'greedy_soup'"):
        LEARNERS.build("greedysoup", {})
