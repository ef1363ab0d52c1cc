"""DWiSE-FT: one layer's best position by hand, one expert is WiSE-FT, layers share coefficients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import factory
from learning import recipe_of, tasks_of
from safetensors.torch import save_file
from torch import nn

from mergewell.descent.merge import layer_of
from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError
from mergewell.learners.base import Material
from mergewell.learners.dwise_ft import DwiseFt
from mergewell.plan import make_plan
from mergewell.recipe import MethodChoice, make_recipe
from mergewell.run import merge_tensors


def line() -> nn.Module:
    return nn.Linear(1, 2, bias=False)


def test_the_best_position_by_hand(tmp_path: Path) -> None:
    """Logits (a x, 0) with x = 1: three of four labels say 0, so a = log 3 is best."""
    save_file({"weight": torch.zeros(2, 1)}, tmp_path / "base.safetensors")
    save_file({"weight": torch.tensor([[2.0], [0.0]])}, tmp_path / "expert.safetensors")
    recipe = make_recipe(
        {"base": str(tmp_path / "base.safetensors"),
         "experts": [{"path": str(tmp_path / "expert.safetensors")}]}
    )  # fmt: skip
    task = LearningTask(0, [torch.ones(4, 1)], [torch.tensor([0, 0, 0, 1])])
    learned = DwiseFt(steps=400, rate=0.02).learn(recipe, Material(line, tasks=[task]))
    (rule,) = learned.recipe.rules
    assert rule.coefficients == pytest.approx((torch.tensor(3.0).log().item() / 2,), abs=1e-3)
    assert learned.trials[0].score < learned.score


def test_a_layer_has_one_coefficient_and_one_expert_is_wise_ft(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, 1)
    given = Material(factory, tasks=tasks_of(1, labelled=True))
    rules = DwiseFt(steps=5).learn(recipe, given).recipe.rules
    by_name = {rule.match: rule.coefficients for rule in rules}
    assert by_name["0.weight"] == by_name["0.bias"] != by_name["2.weight"] == by_name["2.bias"]
    still = DwiseFt(steps=1, rate=1e-12, start=0.4).learn(recipe, given).recipe
    line_of = recipe.model_copy(update={"method": MethodChoice(name="wise_ft", t=0.4)})
    merged = dict(merge_tensors(make_plan(still)))
    for name, tensor in merge_tensors(make_plan(line_of)):
        torch.testing.assert_close(merged[name], tensor)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vision_model.encoder.layers.3.mlp.fc1.weight", "vision_model.encoder.layers.3"),
        ("layer1.0.conv1.weight", "layer1.0"),
        ("12.weight", "12"),
        ("head.bias", "head"),
        ("weight", ""),
    ],
)
def test_layers_by_name(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_it_says_that_labels_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels for 0 of 2"):
        DwiseFt().learn(recipe_of(tmp_path, 1), Material(factory, tasks=tasks_of(1)))
