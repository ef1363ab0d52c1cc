"""Distillation: by hand, no step is the start, origins may differ, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import factory, tiny_family
from learning import distant
from safetensors.torch import load_file, save_file
from torch import nn

from mergewell.descent.tasks import LearningTask
from mergewell.errors import DataError, ModelError, OutputError, RecipeError
from mergewell.learners.base import Material
from mergewell.learners.distillation import Distillation
from mergewell.plan import make_plan
from mergewell.recipe import Recipe, make_recipe
from mergewell.run import merge_tensors
from mergewell.storage.checkpoint import open_checkpoint


def recipe_of(folder: Path, count: int, **more: object) -> Recipe:
    base, experts = tiny_family(folder, count)
    return make_recipe(
        {"base": str(base), "experts": [{"path": str(path)} for path in experts], **more}
    )


def material(count: int) -> Material:
    return distant(factory, count)


def merged(recipe: Recipe) -> dict[str, torch.Tensor]:
    return dict(merge_tensors(make_plan(recipe)))


def line(folder: Path, **weights: float) -> Recipe:
    """Models y = w x; all are experts."""
    for name, weight in weights.items():
        save_file({"weight": torch.tensor([[weight]])}, folder / f"{name}.safetensors")
    return make_recipe({"experts": [{"path": str(folder / f"{n}.safetensors")} for n in weights]})


def scalar() -> nn.Module:
    return nn.Linear(1, 1, bias=False).eval()


def test_outputs_by_hand(tmp_path: Path) -> None:
    """Experts 1 and 3 start at 2; of inputs of expert 3, (2w - 6)^2 / 36 = 1/9; Adam goes 0.25."""
    recipe = line(tmp_path, one=1.0, three=3.0)
    given = Material(scalar, tasks=[LearningTask(1, [torch.tensor([[2.0]])])])
    learner = Distillation(match="outputs", steps=1, rate=0.25, folder=str(tmp_path / "out"))
    learned = learner.learn(recipe, given)
    assert learned.trials[0].score == pytest.approx(-1 / 9)
    assert merged(learned.recipe)["weight"].item() == pytest.approx(2.25, abs=1e-5)
    assert learned.score == pytest.approx(-((0.75 / 3) ** 2), abs=1e-5)
    # the ensemble of the two says what the start says: there is nothing to learn
    even = learner.model_copy(update={"aim": "ensemble"}).learn(recipe, given)
    assert merged(even.recipe)["weight"].item() == 2.0 and even.score == 0.0


@pytest.mark.parametrize("start", [0, 2])
def test_without_steps_it_is_the_start_bit_for_bit(tmp_path: Path, start: int) -> None:
    method = {"name": "task_arithmetic", "scale": 0.4}
    recipe = recipe_of(tmp_path, 2, method=method)
    learner = Distillation.model_validate(
        {"steps": 0, "start": start, "folder": str(tmp_path / "out"), "method": method}
    )
    learned = learner.learn(recipe_of(tmp_path, 2), material(2))
    wanted = load_file(recipe.experts[1].path) if start else merged(recipe)
    found = merged(learned.recipe)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert learned.trials[0].score == learned.score


@pytest.mark.parametrize("aim", ["expert", "ensemble"])
def test_it_comes_near_to_what_is_said_and_only_moves_what_experts_moved(
    tmp_path: Path, aim: str
) -> None:
    recipe = recipe_of(tmp_path, 2, rules=[{"match": "0.bias", "method": {"name": "average"}}])
    settings = {"aim": aim, "steps": 150, "rate": 0.01, "folder": str(tmp_path / "out")}
    learned = Distillation.model_validate(settings).learn(recipe, material(2))
    assert 0 < -learned.score < 0.2 * -learned.trials[0].score
    before, after = merged(recipe), merged(learned.recipe)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"0.weight", "2.weight", "2.bias"}
    assert f"to the {aim}" in learned.recipe.notes[-1] and "3 tensors" in learned.recipe.notes[-1]
    again = Distillation.model_validate(settings).learn(recipe, material(2))
    assert again.recipe == learned.recipe


def test_origins_may_differ(tmp_path: Path) -> None:
    """Two networks drawn apart, no base: started from one, it learns the other's task as well."""
    paths: list[Path] = []
    for seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = {n: 2 * t for n, t in factory().state_dict().items()}
            paths.append(tmp_path / f"{seed}.safetensors")
            save_file(state, paths[-1])
    recipe = make_recipe({"experts": [{"path": str(path)} for path in paths]})
    learned = Distillation(
        start=1, steps=300, rate=0.02, folder=str(tmp_path / "out")
    ).learn(recipe, material(2))  # fmt: skip
    assert -learned.score < 0.3 * -learned.trials[0].score
    assert learned.recipe.base is None and len(learned.recipe.experts) == 1


def test_the_file_says_what_it_was_learned_from_and_rules_that_omit_stay(tmp_path: Path) -> None:
    for name, factor in (("base", 1.0), ("a", 2.0), ("b", 3.0)):
        state = {"body.weight": factor * torch.eye(4), "head.weight": torch.eye(4)}
        save_file(state, tmp_path / f"{name}.safetensors")
    experts = [{"path": str(tmp_path / f"{name}.safetensors")} for name in "ab"]
    rules = [{"match": "head.*", "omit": True}]
    base = str(tmp_path / "base.safetensors")
    recipe = make_recipe({"base": base, "experts": experts, "rules": rules})
    headless = Material(_Body, tasks=material(2).tasks)
    learned = Distillation(steps=1, folder=str(tmp_path / "out")).learn(recipe, headless)
    (expert,) = learned.recipe.experts
    file = open_checkpoint(expert.path)
    assert file.metadata["mergewell.learned_from"] == recipe.to_yaml()
    assert list(file) == ["body.weight"] == list(merged(learned.recipe))


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_mistakes_are_refused(tmp_path: Path) -> None:
    recipe, given, out = recipe_of(tmp_path, 2), material(2), str(tmp_path / "out")
    short = Distillation(steps=1, folder=out)
    with pytest.raises(RecipeError, match=r"name a folder for it with --set folder=DIR"):
        Distillation().learn(recipe, given)
    with pytest.raises(OutputError, match="is a file"):
        Distillation(folder=str(recipe.base)).learn(recipe, given)
    with pytest.raises(RecipeError, match="start = 3 names none of 2 experts"):
        Distillation(folder=out, start=3).learn(recipe, given)
    with pytest.raises(DataError, match="each expert's task; give some"):
        short.learn(recipe, Material(factory))
    unknown = Material(factory, tasks=[replace(task, expert=None) for task in given.tasks])
    with pytest.raises(DataError, match="not whose the inputs are"):
        short.learn(recipe, unknown)
    short.model_copy(update={"aim": "ensemble"}).learn(recipe, unknown)
    alone = recipe.model_copy(
        update={"experts": (recipe.experts[0].model_copy(update={"path": recipe.base}),)}
    )
    with pytest.raises(ModelError, match="No parameter of the module differs"):
        short.learn(alone, material(1))
