"""The library in ten functions: all that the command line does, on a toy, and lazily."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mergewell
from mergewell.errors import ModelError


class Net(nn.Sequential):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def small_weights(module: nn.Module) -> float:
    """A metric: the smaller the weights, the better."""
    return -sum(float(p.detach().square().sum()) for p in module.parameters())


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Write a base, two experts and data for each; name a module that makes the net."""
    monkeypatch.setitem(sys.modules, "own_net", sys.modules[__name__])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = Net().state_dict()
        found = {"base": tmp_path / "base.safetensors"}
        save_file(state, found["base"])
        for name in ("one", "two"):
            moved: dict[str, Tensor] = {n: t + 0.1 * torch.randn(t.shape) for n, t in state.items()}
            found[name] = tmp_path / f"{name}.safetensors"
            save_file(moved, found[name])
            data = {"x": torch.randn(12, 4), "labels": torch.arange(12) % 3}
            found[f"{name} data"] = tmp_path / f"{name}_data.safetensors"
            save_file(data, found[f"{name} data"])
    return found


def test_ten_functions_from_recipe_to_result(toy: dict[str, Path], tmp_path: Path) -> None:
    factory = "own_net:Net"
    labelled = [toy["one data"], toy["two data"]]
    plain = {"base": str(toy["base"]), "experts": [{"path": str(toy[n])} for n in ("one", "two")]}
    recipe = mergewell.load_recipe(plain)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert mergewell.load_recipe(tmp_path / "recipe.yaml") == recipe
    assert list(mergewell.plan_recipe(recipe).tasks) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert mergewell.examine_merge(recipe).troubles == ()
    only = tmp_path / "inputs.safetensors"
    save_file({"x": torch.randn(16, 4)}, only)
    assert mergewell.check_recipe(recipe, data=only, model_factory=factory).samples == 16
    seen = mergewell.calibrate_recipe(
        recipe, only, model_factory=factory, out=tmp_path / "seen.safetensors"
    )
    assert seen.seen == 16 and (tmp_path / "seen.safetensors").is_file()

    learned = mergewell.learn_recipe(
        recipe, "greedy_soup", metric=small_weights, model_factory="own_net:Net"
    )
    assert learned.score == max(trial.score for trial in learned.trials)
    by_labels = mergewell.learn_recipe(recipe, "greedy_soup", labelled, model_factory=factory)
    assert 0 <= by_labels.score <= 1
    tuned = mergewell.tune_recipe(
        recipe, methods=["task_arithmetic"], metric=small_weights, model_factory=factory
    )
    values = [tried.divergence.value for tried in tuned.tried]
    assert values == sorted(values) and "by the metric small_weights" in tuned.recipe.notes[-1]
    near = mergewell.tune_recipe(
        recipe, labelled, methods=["ties"], budget=2, model_factory=factory
    )
    assert "without labels among 2 candidates" in near.recipe.notes[-1]

    manifest = mergewell.merge_recipe(recipe, tmp_path / "out")
    assert manifest.tensors_changed == 4
    assert mergewell.verify_folder(tmp_path / "out").problems == ()
    assert mergewell.verify_folder(tmp_path / "out", deep=True).problems == ()
    judged = mergewell.evaluate_models(
        {"one": toy["one"], "two": toy["two"], "merged": tmp_path / "out"},
        {"a": toy["one data"], "b": toy["two data"]},
        metrics=[small_weights], experts=["one", "two"], model_factory=factory,
    )  # fmt: skip
    assert list(judged.metrics.values()) == ["accuracy", "accuracy", "small_weights"]
    assert judged.models["two"].retention["b"].value == 1.0
    with pytest.raises(ModelError, match="give a model_factory"):
        mergewell.learn_recipe(recipe, "greedy_soup", labelled)


def test_importing_the_package_is_light_and_names_ten_functions() -> None:
    code = (
        "import sys, mergewell; assert 'torch' not in sys.modules; "
        "assert all(n in dir(mergewell) for n in mergewell.__all__); "
        "assert len(mergewell.__all__) == 10"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in mergewell.__all__:
        assert (getattr(mergewell, name).__doc__ or "").partition("\n")[0].endswith(".")
    with pytest.raises(AttributeError, match="no attribute 'merge_recipes'"):
        _ = mergewell.merge_recipes
